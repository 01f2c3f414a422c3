"""Feed-forward networks: single, and stacked experts."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.moe.products import RowLayout, product, row_layout


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as in every published DiT."""
    return functional.gelu(x, approximate="tanh")


class Mlp(nn.Module):
    """Two-layer MLP D -> F -> D with biases."""

    matrices: ClassVar = {"fc1.weight": 1, "fc2.weight": 1}

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = _gelu_tanh) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class _SwiGlu(nn.Module):
    """Gated MLP D -> F -> D without biases: down(SiLU(gate x) * up x) (Shazeer, arXiv 2002.05202)."""

    matrices: ClassVar = {"gate_proj.weight": 1, "up_proj.weight": 1, "down_proj.weight": 1}

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
        return _SwiGlu(width, hidden)
    if kind == "identity":
        return nn.Identity()
    return Mlp(width, hidden, functional.silu if kind == "silu" else _gelu_tanh)


class Experts(nn.Module):
    """E feed-forward networks D -> F -> D of one kind, stacked: all of a layer, or the part that this rank holds.

    gelu: w1 (E, F, D), w2 (E, D, F), w3 (E, 1, F + D) both biases. swiglu: w1 the gate and w3 (E, F, D) the
    other factor, w2 the output, no biases. Every expert takes part even without rows: ZeRO-3 needs each parameter's
    hooks to fire on each rank. The three names are those of DeepSpeed's expert checkpoints.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, kind: str = "gelu") -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden, self.kind = num_experts, width, hidden, kind
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        third = (hidden, width) if kind == "swiglu" else (1, hidden + width)
        self.w3 = nn.Parameter(torch.zeros(num_experts, *third))
        self.matrices = {"w1": 1, "w2": 1} | ({"w3": 1} if kind == "swiglu" else {})

    @property
    def widths(self) -> tuple[int, int]:
        """D and F."""
        return self.width, self.hidden

    def forward(self, rows: Tensor, counts: Tensor | int) -> Tensor:
        """Apply expert e to its rows of `rows` (R, D), which are sorted by expert; returns (R, D).

        counts: rows of each expert, (E,) int64 on the rows' device with sum R, or an int where all have the same. On
        CUDA an int and the grouped product read nothing back from the device; the split loop does.
        """
        layout = row_layout(rows, counts, self.num_experts, self.widths)
        return self.apply_in(rows.contiguous(), layout)

    def apply_in(self, rows: Tensor, layout: RowLayout) -> Tensor:
        """Apply the experts to contiguous rows (R, D) of a layout; returns (R, D)."""
        if self.kind == "swiglu":
            inner = functional.silu(product(rows, self.w1, None, layout)) * product(rows, self.w3, None, layout)
            return product(inner, self.w2, None, layout)
        b1, b2 = self.w3.squeeze(1).split([self.hidden, self.width], dim=-1)
        return product(_gelu_tanh(product(rows, self.w1, b1, layout)), self.w2, b2, layout)
