"""Feed-forward networks: single ones, and stacked experts."""

from collections.abc import Callable, Sequence

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
    """E feed-forward networks D -> F -> D of one kind, stacked.

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

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its `counts[e]` rows of `rows` (R, D), which are sorted by expert; returns (R, D)."""
        if len(set(counts)) == 1 and counts[0] > 0:
            return self._equal(rows.view(self.num_experts, counts[0], self.width)).reshape(rows.shape)
        return self._split(rows, counts)

    def _equal(self, rows: Tensor) -> Tensor:
        if self.kind == "swiglu":
            inner = functional.silu(rows @ self.w1.transpose(1, 2)) * (rows @ self.w3.transpose(1, 2))
            return inner @ self.w2.transpose(1, 2)
        b1, b2 = self.w3.split([self.hidden, self.width], dim=-1)
        inner = gelu_tanh(torch.baddbmm(b1, rows, self.w1.transpose(1, 2)))
        return torch.baddbmm(b2, inner, self.w2.transpose(1, 2))

    def _split(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # unbind once: indexing a stacked weight per expert would write a full-size zero gradient each time.
        stacked = zip(rows.split(list(counts)), self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        return torch.cat([self._one(part, w1, w2, w3) for part, w1, w2, w3 in stacked])

    def _one(self, rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        if self.kind == "swiglu":
            inner = functional.silu(functional.linear(rows, w1)) * functional.linear(rows, w3)
            return functional.linear(inner, w2)
        b1, b2 = w3[0].split([self.hidden, self.width])
        return functional.linear(gelu_tanh(functional.linear(rows, w1, b1)), w2, b2)
