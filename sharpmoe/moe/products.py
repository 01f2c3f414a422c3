"""Products of rows with their experts' weights: rows (P, in) sorted by expert, weights (E, out, in).

One differentiable function over three row layouts. It is written out instead of left to autograd for three reasons:
the gradient of a weight has the weight's own memory layout (autograd's is transposed, and would be copied where it is
kept); what is saved for backward is the parameter itself, which ZeRO-3 may partition and gather again in between, where
a saved view would hold the gathered weight until backward; and a stacked weight is never indexed, which would write a
full-size zero gradient per expert.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# MKL takes up to 1.3 times as long for few rows and a long contraction in one piece (docs/design/0007-moe-compute.md).
_FEW_ROWS, _PART = 128, 256


class RowLayout(Protocol):
    """Which rows belong to which expert, and how they are multiplied."""

    def times(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply rows (P, in) by weight (E, out, in) and add bias (E, out): (P, out)."""
        ...

    def back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Multiply a gradient (P, out) by weight (E, out, in): (P, in)."""
        ...

    def outer(self, gradient: Tensor, rows: Tensor) -> Tensor:
        """Multiply, per expert, the transposed gradient (out, P_e) by rows (P_e, in): (E, out, in)."""
        ...

    def sums(self, gradient: Tensor) -> Tensor:
        """Sum each expert's rows: (E, out)."""
        ...


class _Equal(NamedTuple):
    """Every expert has `each` rows: batched products."""

    num_experts: int
    each: int

    def times(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batched, turned = self._batched(rows), weight.transpose(1, 2)
        out = torch.bmm(batched, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), batched, turned)
        return out.view(len(rows), weight.shape[1])

    def back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        left, inner = self._batched(gradient), weight.shape[1]
        in_parts = gradient.device.type == "cpu" and gradient.element_size() >= 4 and self.each <= _FEW_ROWS
        part = _PART if in_parts else inner
        out = torch.bmm(left[:, :, :part], weight[:, :part])
        for at in range(part, inner, part):
            torch.baddbmm(out, left[:, :, at : at + part], weight[:, at : at + part], out=out)
        return out.view(len(gradient), weight.shape[2])

    def outer(self, gradient: Tensor, rows: Tensor) -> Tensor:
        return torch.bmm(self._batched(gradient).transpose(1, 2), self._batched(rows))

    def sums(self, gradient: Tensor) -> Tensor:
        return self._batched(gradient).sum(1)

    def _batched(self, rows: Tensor) -> Tensor:
        return rows.view(self.num_experts, self.each, rows.shape[1])


class _Grouped(NamedTuple):
    """Counts stay on the device: grouped_mm. Rows follow one another without a gap, which it leaves undefined."""

    offsets: Tensor  # (E,) int32, ends
    one_hot: Tensor  # (P, E) of the rows' dtype: a bias and its gradient are products with it, without atomics

    def times(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = functional.grouped_mm(rows, weight.transpose(1, 2), offs=self.offsets)
        return out if bias is None else out.addmm_(self.one_hot, bias)

    def back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        return functional.grouped_mm(gradient, weight, offs=self.offsets)

    def outer(self, gradient: Tensor, rows: Tensor) -> Tensor:
        return functional.grouped_mm(gradient.t(), rows, offs=self.offsets)

    def sums(self, gradient: Tensor) -> Tensor:
        return self.one_hot.t() @ gradient


class _Split(NamedTuple):
    """Counts are known on the host: one product per expert, written where it belongs.

    widened: operands are copied to float32, an expert at a time, and each result is rounded once.
    """

    sizes: tuple[int, ...]
    widened: bool = False

    def times(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = rows.new_empty(len(rows), weight.shape[1])
        parts = zip(out.split(self.sizes), rows.split(self.sizes), weight, strict=True)
        for expert, (target, part, matrix) in enumerate(parts):
            self._multiply(part, matrix.t(), target, None if bias is None else bias[expert])
        return out

    def back(self, gradient: Tensor, weight: Tensor) -> Tensor:
        out = gradient.new_empty(len(gradient), weight.shape[2])
        for target, part, matrix in zip(out.split(self.sizes), gradient.split(self.sizes), weight, strict=True):
            self._multiply(part, matrix, target)
        return out

    def outer(self, gradient: Tensor, rows: Tensor) -> Tensor:
        out = gradient.new_empty(len(self.sizes), gradient.shape[1], rows.shape[1])
        for target, left, right in zip(out, gradient.split(self.sizes), rows.split(self.sizes), strict=True):
            self._multiply(left.t(), right, target)
        return out

    def sums(self, gradient: Tensor) -> Tensor:
        return torch.stack([part.sum(0) for part in gradient.split(self.sizes)])

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        if self.widened:
            wide = torch.mm(left.float(), right.float())
            out.copy_(wide if bias is None else wide.add_(bias))
        elif bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias, left, right, out=out)


def row_layout(rows: Tensor, counts: Tensor | int, num_experts: int, widths: Sequence[int]) -> RowLayout:
    """Choose how rows, sorted by expert, are multiplied with weights of these widths.

    counts: rows of each expert, (E,) int64 on the rows' device, or an int where all have the same. On CUDA an int and
    the grouped product read nothing back from the device; the split loop does.
    """
    widened = _widens(rows)
    if isinstance(counts, int):
        return _Split((counts,) * num_experts, widened) if widened else _Equal(num_experts, counts)
    if len(rows) > 0 and keeps_counts(rows, widths):
        return _grouped(counts, rows)
    sizes = tuple(counts.tolist())
    if widened or len(set(sizes)) > 1:
        return _Split(sizes, widened)
    return _Equal(num_experts, sizes[0])


def keeps_counts(rows: Tensor, widths: Sequence[int]) -> bool:
    """Whether counts stay on the device, by the grouped product: on CUDA in bf16, with row strides of 16 bytes.

    On CPU it is as exact as the split loop and not faster. It has no float64; without rows there is nothing to gain.
    """
    return rows.is_cuda and rows.dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)


def _widens(rows: Tensor) -> bool:
    """Whether products of such rows are faster in float32: in bf16 on a CPU, unless it has AMX tiles.

    Without AMX oneDNN's bf16 products run at half of the float32 rate with AVX512_BF16, at a quarter without, and their
    result is no more exact: both sum in float32.
    """
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and not _amx_in_use()


@torch.compiler.assume_constant_result  # asked while a block is traced: the question is no part of a graph
def _amx_in_use() -> bool:
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()  # `sharpmoe.parallel.ranks.launch` sets it
    return torch.cpu._is_amx_tile_supported() and (most in ("", "ALL", "DEFAULT") or "AMX" in most)


def _grouped(counts: Tensor, rows: Tensor) -> _Grouped:
    """Return the layout of counts (E,) int64 on the rows' device, with len(rows) as sum. Reads nothing back."""
    experts = torch.arange(len(counts), device=rows.device)
    owner = experts.repeat_interleave(counts, output_size=len(rows))
    return _Grouped(counts.cumsum(0, dtype=torch.int32), (owner.unsqueeze(1) == experts).to(rows.dtype))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout) -> Tensor:
    """Rows (P, in) times each expert's weight (E, out, in) transposed, plus its bias (E, out): (P, out).

    Differentiable once. Every expert takes part even without rows: its gradient is zero, never missing.
    """
    out: Tensor = _Product.apply(rows, weight, bias, layout)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(rows, weight)
        return layout.times(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # that of a plain sum is one number, expanded
        needs = ctx.needs_input_grad
        return (
            ctx.layout.back(gradient, weight) if needs[0] else None,
            ctx.layout.outer(gradient, rows) if needs[1] else None,
            ctx.layout.sums(gradient) if needs[2] else None,
            None,
        )
