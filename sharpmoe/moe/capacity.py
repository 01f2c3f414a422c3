"""DiffMoE's capacity predictor, and what moves once per optimizer step: thresholds and load-balancing biases."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.moe.router import Linear32
from sharpmoe.moe.routing import tokens_per_expert


class CapacityPredictor(nn.Module):
    """Two-layer SiLU MLP on detached tokens: how likely each expert is to take each token of a training pool.

    DiffMoE (arXiv 2503.14487), section 3.3.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = Linear32(width, width)
        self.out = Linear32(width, num_experts)

    def forward(self, h: Tensor) -> Tensor:
        """Map tokens (B, N, D) to logits (B, N, E) float32. The input is detached: the trunk does not learn from it."""
        logits: Tensor = self.out(functional.silu(self.hidden(h.detach())))
        return logits


def threshold_candidates(capacity_logits: Sequence[Tensor], capacity: float) -> Tensor:
    """k-th largest predicted probability of each expert over one training pool, for all layers in one selection.

    Layers x (B, N, E) -> (layers, E). Detached.
    """
    stacked = torch.stack([logits.detach().flatten(0, 1).t() for logits in capacity_logits])  # (layers, E, B N)
    pool = stacked.shape[-1]
    count = tokens_per_expert(pool, stacked.shape[1], capacity)
    return stacked.kthvalue(pool - count + 1).values.sigmoid()


@torch.no_grad()
def update_thresholds(thresholds: Sequence[Tensor], candidates: Tensor, decay: float) -> None:
    """Move the threshold buffers (layers x (E,)) once: decay * old + (1 - decay) * candidates (layers, E).

    Called once per optimizer step with candidates averaged over rollout steps, micro-batches and ranks; a forward never
    moves them, or a rollout would move them T times.
    """
    for threshold, candidate in zip(thresholds, candidates, strict=True):
        threshold.mul_(decay).add_(candidate.to(threshold), alpha=1 - decay)


@torch.no_grad()
def update_biases(biases: Sequence[Tensor], loads: Tensor, rate: float) -> None:
    """Balance loads without a loss (arXiv 2408.15664, Algorithm 1): move each bias (layers x (E,)) by `rate`, once.

    loads (layers, E): tokens each expert took in the optimizer step, over all ranks, in any unit. An expert with less
    than the mean load is raised, one with more is lowered.
    """
    for bias, load in zip(biases, loads, strict=True):
        bias.add_((load.mean() - load).sign().to(bias), alpha=rate)
