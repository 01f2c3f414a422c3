"""Feed-forward networks: single ones, and stacked experts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as every published DiT has it."""
    return functional.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Two-layer MLP D -> F -> D with biases."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = gelu_tanh) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """Gated MLP D -> F -> D without biases: down(SiLU(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def feed_forward(kind: str, width: int, hidden: int) -> nn.Module:
    """Build the feed-forward network of a dense block or a shared expert: gelu, silu, swiglu or identity."""
    if kind == "swiglu":
        return SwiGlu(width, hidden)
    if kind == "identity":
        return nn.Identity()
    return Mlp(width, hidden, functional.silu if kind == "silu" else gelu_tanh)


class Experts(nn.Module):
    """E feed-forward networks D -> F -> D of one kind, stacked: all of a layer, or the part that this rank holds.

    gelu: w1 (E, F, D), w2 (E, D, F), w3 (E, 1, F + D) both biases. swiglu: w1 the gate and w3 (E, F, D) the other
    factor, w2 the way back, no biases. Every expert takes part even without rows: ZeRO-3 needs each parameter's hooks
    to fire on each rank. The three names are those that DeepSpeed's expert checkpoints know.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, kind: str = "gelu") -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden, self.kind = num_experts, width, hidden, kind
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (hidden, width) if kind == "swiglu" else (1, hidden + width)
        self.w3 = nn.Parameter(torch.zeros(num_experts, *third))

    def forward(self, rows: Tensor, counts: Tensor | int) -> Tensor:
        """Apply expert e to its rows of `rows` (R, D), which are sorted by expert; returns (R, D).

        counts: rows of each expert, (E,) int64 on the rows' device with sum R, or an int where all have the same. On
        CUDA an int and the grouped product read nothing back from the device; the split loop does.
        """
        if isinstance(counts, int):
            return self._equal(rows) if counts else self._split(rows, [0] * self.num_experts)
        if self._grouped_applies(rows):
            return self._grouped(rows, counts)
        sizes = counts.tolist()
        return self._equal(rows) if sizes[0] and len(set(sizes)) == 1 else self._split(rows, sizes)

    def _grouped_applies(self, rows: Tensor) -> bool:
        """Whether the grouped product is the way: on CUDA in bf16, with row strides of 16 bytes.

        On CPU it is as exact as the split loop and not surely faster: 0.66 to 1.1 of its time (forward and backward,
        one core, 4 to 32 experts of width 128 and 384). It knows no float64; without rows there is nothing to gain.
        """
        aligned = self.width % 8 == 0 and self.hidden % 8 == 0
        return rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and len(rows) > 0

    def _equal(self, rows: Tensor) -> Tensor:
        batched = rows.view(self.num_experts, len(rows) // self.num_experts, self.width)
        if self.kind == "swiglu":
            inner = functional.silu(batched @ self.w1.transpose(1, 2)) * (batched @ self.w3.transpose(1, 2))
            return (inner @ self.w2.transpose(1, 2)).view(rows.shape)
        b1, b2 = self.w3.split([self.hidden, self.width], dim=-1)
        inner = gelu_tanh(torch.baddbmm(b1, batched, self.w1.transpose(1, 2)))
        return torch.baddbmm(b2, inner, self.w2.transpose(1, 2)).view(rows.shape)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        offsets = counts.cumsum(0, dtype=torch.int32)
        if self.kind == "swiglu":
            inner = functional.silu(grouped(rows, self.w1, offsets)) * grouped(rows, self.w3, offsets)
            return grouped(inner, self.w2, offsets)
        # The biases are added as a product with the rows' one-hot experts: exact, and its gradient is a product too,
        # where an indexed bias would be summed by one atomic addition per row.
        index = torch.arange(self.num_experts, device=rows.device)
        owner = index.repeat_interleave(counts, output_size=len(rows))
        one_hot = (owner.unsqueeze(1) == index).to(rows.dtype)
        b1, b2 = self.w3.squeeze(1).split([self.hidden, self.width], dim=-1)
        inner = gelu_tanh(torch.addmm(grouped(rows, self.w1, offsets), one_hot, b1))
        return torch.addmm(grouped(inner, self.w2, offsets), one_hot, b2)

    def _split(self, rows: Tensor, sizes: list[int]) -> Tensor:
        # unbind once: indexing a stacked weight per expert would write a full-size zero gradient each time.
        stacked = zip(rows.split(sizes), self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        return torch.cat([self._one(part, w1, w2, w3) for part, w1, w2, w3 in stacked])

    def _one(self, rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        if self.kind == "swiglu":
            inner = functional.silu(functional.linear(rows, w1)) * functional.linear(rows, w3)
            return functional.linear(inner, w2)
        b1, b2 = w3[0].split([self.hidden, self.width])
        return functional.linear(gelu_tanh(functional.linear(rows, w1, b1)), w2, b2)


def grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows (R, in), sorted by expert, times each expert's weight (E, out, in) transposed; offsets (E,) int32 are ends.

    The last offset is R: grouped_mm leaves what follows it undefined. Its backward cannot read an expanded gradient.
    """
    out = functional.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)
    return out
