"""Stacked expert MLPs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Experts(nn.Module):
    """E two-layer GELU(tanh) MLPs D -> F -> D, stacked: w1 (E, F, D), w2 (E, D, F), w3 (E, 1, F + D) both biases.

    Stacked, and every expert takes part even without rows: ZeRO-3 needs each parameter's hooks to fire on each rank.
    The three names are those that DeepSpeed's expert checkpoints know.
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.w3 = nn.Parameter(torch.zeros(num_experts, 1, hidden + width))

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its `counts[e]` rows of `rows` (R, D), which are sorted by expert; returns (R, D)."""
        if len(set(counts)) == 1 and counts[0] > 0:
            return self._equal(rows.view(self.num_experts, counts[0], self.width)).reshape(rows.shape)
        return self._split(rows, counts)

    def _equal(self, rows: Tensor) -> Tensor:
        b1, b2 = self.w3.split([self.hidden, self.width], dim=-1)
        inner = functional.gelu(torch.baddbmm(b1, rows, self.w1.transpose(1, 2)), approximate="tanh")
        return torch.baddbmm(b2, inner, self.w2.transpose(1, 2))

    def _split(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # unbind once: indexing a stacked weight per expert would write a full-size zero gradient each time.
        stacked = zip(rows.split(list(counts)), self.w1.unbind(), self.w2.unbind(), self.w3.unbind(), strict=True)
        done = []
        for part, w1, w2, biases in stacked:
            b1, b2 = biases[0].split([self.hidden, self.width])
            inner = functional.gelu(functional.linear(part, w1, b1), approximate="tanh")
            done.append(functional.linear(inner, w2, b2))
        return torch.cat(done)
