"""What moves once per optimizer step: thresholds for inference, and biases that balance loads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig, OptimConfig
from sharpmoe.families import tokens_per_expert
from sharpmoe.moe.router import Router
from sharpmoe.moe.routing import Routing


def threshold_candidates(records: Sequence[Routing], config: ModelConfig) -> Tensor:
    """Return what one call moves the thresholds towards, (layers, E), detached; the family has thresholds.

    records: one per MoE layer, of a training call. "predicted": the k-th largest predicted probability of each expert
    over the call, k being what an expert takes; "accepted": the lowest score that was accepted.
    """
    if config.family.thresholds == "predicted":
        return _kth_probabilities(
            [record.capacity_logits for record in records if record.capacity_logits is not None], config.moe_blocks
        )
    return torch.stack([record.cutoff.flatten() for record in records])


def _kth_probabilities(capacity_logits: Sequence[Tensor], layers: Sequence[ModelConfig]) -> Tensor:
    """Return k-th largest probabilities (layers, E) of layers x (B, N, E), for all layers in one selection."""
    stacked = torch.stack([logits.detach().flatten(0, 1).t() for logits in capacity_logits])  # (layers, E, B N)
    pool = stacked.shape[-1]
    counts = [tokens_per_expert(pool, each.num_experts, each.capacity, each.family.rounding) for each in layers]
    if len(set(counts)) == 1:
        return stacked.kthvalue(pool - counts[0] + 1).values.sigmoid()
    found = [layer.kthvalue(pool - count + 1).values for layer, count in zip(stacked, counts, strict=True)]
    return torch.stack(found).sigmoid()


def update_routers(
    layers: Sequence[Router], thresholds: Tensor | None, loads: Tensor | None, optim: OptimConfig
) -> None:
    """Move what moves once per optimizer step, in place; None for what the family does not have.

    thresholds (layers, E): candidates, averaged over rollout steps, micro-batches and ranks. loads (layers, E): tokens
    that each expert took. No communication.
    """
    if thresholds is not None:
        update_thresholds([layer.expert_threshold for layer in layers], thresholds, optim.threshold_decay)
    if loads is not None:
        update_biases([layer.expert_bias for layer in layers], loads, optim.bias_rate)


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
