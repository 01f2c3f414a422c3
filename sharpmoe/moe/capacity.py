"""DiffMoE's capacity predictor and its thresholds (arXiv 2503.14487, section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.moe.router import Linear32
from sharpmoe.moe.routing import tokens_per_expert


class CapacityPredictor(nn.Module):
    """Two-layer SiLU MLP on detached tokens: how likely each expert is to take each token of a training pool."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = Linear32(width, width)
        self.out = Linear32(width, num_experts)

    def forward(self, h: Tensor) -> Tensor:
        """Map tokens (B, N, D) to logits (B, N, E) float32. The input is detached: the trunk does not learn from it."""
        logits: Tensor = self.out(functional.silu(self.hidden(h.detach())))
        return logits


def threshold_candidate(capacity_logits: Tensor, capacity: float) -> Tensor:
    """k-th largest predicted probability of each expert over one training pool: (B, N, E) -> (E,). Detached."""
    flat = capacity_logits.detach().flatten(0, 1)
    count = tokens_per_expert(flat.shape[0], flat.shape[1], capacity)
    return flat.topk(count, dim=0).values[-1].sigmoid()


@torch.no_grad()
def update_thresholds(thresholds: Sequence[Tensor], candidates: Tensor, decay: float) -> None:
    """Move the threshold buffers (layers x (E,)) once: decay * old + (1 - decay) * candidates (layers, E).

    Called once per optimizer step with candidates averaged over rollout steps, micro-batches and ranks; a forward never
    moves them, or a rollout would move them T times.
    """
    for threshold, candidate in zip(thresholds, candidates, strict=True):
        threshold.mul_(decay).add_(candidate.to(threshold), alpha=1 - decay)
