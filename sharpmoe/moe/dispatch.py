"""Moving tokens to experts and back. A dispatcher is a plain object; with one rank it does not communicate.

Rows lie sorted by expert, tokens by their place. Sums over a token's rows read them in a fixed order and add nothing
atomically, forward and backward, so that a layer gives the same bits every time, on CUDA too; and no buffer of experts
times tokens is made.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sharpmoe.moe.experts import Experts


class Dispatcher(Protocol):
    """Sends each token to the experts that took it and sums their gated answers. Keeps nothing between calls."""

    def __call__(
        self,
        x: Tensor,
        routing_map: Tensor,
        gates: Tensor,
        experts: Experts,
        rows_per_expert: int | None,
        total: int | None = None,
    ) -> Tensor:
        """Return y (R, D): sum over the chosen experts of gate * expert(x).

        x (R, D) tokens, routing_map (R, E) bool, gates (R, E). `rows_per_expert` is given where the selection rule
        fixes every expert's count, `total` where it fixes the sum of counts only, so that it need not be read back
        from the device.
        """
        ...


class Choices(NamedTuple):
    """The P pairs of a routing map (R, E), each of them a row. All int64."""

    expert: Tensor  # (P,) of each row; rows are sorted by expert, then token
    token: Tensor  # (P,) of each row
    rows: Tensor  # (P,) the rows of the first token, then those of the second, ...; a token's in the order of experts
    starts: Tensor  # (R,) where each token's begin in `rows`


class LocalDispatcher:
    """All experts live here: permute rows by expert, compute, unpermute. No communication."""

    def __call__(
        self,
        x: Tensor,
        routing_map: Tensor,
        gates: Tensor,
        experts: Experts,
        rows_per_expert: int | None,
        total: int | None = None,
    ) -> Tensor:
        """See `Dispatcher`."""
        counts: Tensor | int
        if rows_per_expert is None:
            counts = routing_map.sum(0)
            total = int(counts.sum()) if total is None else check_total(counts, total)
        else:
            check_equal_counts(routing_map, rows_per_expert)
            counts, total = rows_per_expert, rows_per_expert * routing_map.shape[1]
        choices = find_choices(routing_map, total)
        return combine(experts(take(x, choices), counts), choices, gates)


def find_choices(routing_map: Tensor, total: int) -> Choices:
    """The pairs of a routing map (R, E) with `total` of them, without reading their number back from the device."""
    turned = routing_map.t().contiguous()
    expert, token = torch.nonzero_static(turned, size=total).unbind(1)
    owner, taker = torch.nonzero_static(routing_map, size=total).unbind(1)
    row = turned.flatten().cumsum(0).view_as(turned) - 1  # of each pair
    per_token = routing_map.sum(1)
    return Choices(expert, token, row[taker, owner], per_token.cumsum(0) - per_token)


def take(x: Tensor, choices: Choices) -> Tensor:
    """Copy tokens (R, D) to rows (P, D)."""
    rows: Tensor = _Take.apply(x, choices)
    return rows


def combine(out: Tensor, choices: Choices, gates: Tensor) -> Tensor:
    """Gate the experts' answers (P, D) and sum them per token: (R, D). A token that nobody took gets zeros.

    gates (R, E); they are rounded to the dtype of the answers, their gradient is summed in their own.
    """
    y: Tensor = _Combine.apply(out, gates, choices)
    return y


def sum_rows(rows: Tensor, order: Tensor, starts: Tensor, gates: Tensor | None) -> Tensor:
    """Sum rows (P, D), each times its gate (P,), per token: (R, D). `order` and `starts` are those of `Choices`."""
    if not len(rows):
        return rows.new_zeros(len(starts), rows.shape[1])
    weights = None if gates is None else gates.index_select(0, order)
    # A bag of an embedding is this sum: no atomics, accumulated in float32 or better.
    return functional.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=weights)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, choices: Choices) -> Tensor:
        ctx.save_for_backward(choices.rows, choices.starts)
        return x.index_select(0, choices.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        order, starts = ctx.saved_tensors
        return sum_rows(gradient.contiguous(), order, starts, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gates: Tensor, choices: Choices) -> Tensor:
        gate = gates[choices.token, choices.expert].to(out.dtype)
        ctx.save_for_backward(out, gate, choices.token, choices.expert)
        ctx.gates_shape, ctx.gates_dtype = gates.shape, gates.dtype
        return sum_rows(out, choices.rows, choices.starts, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        out, gate, token, expert = ctx.saved_tensors
        rows, d_gates = gradient.index_select(0, token), None
        if ctx.needs_input_grad[1]:
            dots = (rows * out).sum(-1, dtype=ctx.gates_dtype)
            d_gates = dots.new_zeros(ctx.gates_shape).index_put_((token, expert), dots)  # no pair comes twice
        return rows.mul_(gate.unsqueeze(-1)) if ctx.needs_input_grad[0] else None, d_gates, None


def check_equal_counts(routing_map: Tensor, rows_per_expert: int) -> None:
    """Stop where a map (R, E) does not give every expert `rows_per_expert` rows: the answer would be silently wrong.

    On CPU a RuntimeError; on CUDA, without waiting for the device, an assertion there, which ends the process.
    """
    fits = (routing_map.sum(0) == rows_per_expert).all()
    torch._assert_async(
        fits, f"routing map: not every expert took {rows_per_expert} rows; pass rows_per_expert=None for varying counts"
    )


def check_total(counts: Tensor, total: int) -> int:
    """Return `total`; stop where counts (E,) do not add up to it, as `check_equal_counts` does."""
    torch._assert_async(counts.sum() == total, f"routing map: experts did not take {total} rows together")
    return total
