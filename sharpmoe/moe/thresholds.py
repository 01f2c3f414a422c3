"""What moves once per optimizer step: thresholds for inference, cutoffs of trajectories, biases that balance loads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig, OptimConfig
from sharpmoe.families import pairs_of_pool, tokens_per_expert
from sharpmoe.moe.router import Router
from sharpmoe.moe.routing import Routing


def threshold_candidates(records: Sequence[Routing], config: ModelConfig) -> Tensor:
    """Return what one call moves the thresholds towards, (layers, E), detached; the family has thresholds.

    records: one per MoE layer, of a training call. "predicted": the k-th largest predicted probability of each expert
    over the call, k being what an expert takes; "accepted": the lowest score that was accepted.
    """
    if config.family.thresholds == "predicted":
        logits = [record.capacity_logits for record in records if record.capacity_logits is not None]
        return _kth_largest(_tokens_last(logits), config.moe_blocks).sigmoid()
    return torch.stack([record.cutoff.flatten() for record in records])


class TrajectoryPool:
    """The tokens of all steps of a trajectory as one pool, as in the base's training, where a call has all times in it.

    In a rollout the tokens of a call are about equally noisy. An expert that must take as many of them as in any other
    call takes tokens that the base and the sampler would not send there (docs/design/0013).
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._scores: list[Tensor] = []  # of every step (layers, E, B N)
        self._capacity: list[Tensor] = []  # logits, the same of the trained steps

    def add_scores(self, records: Sequence[Routing]) -> None:
        """Add the scores of a step: one record per MoE layer. Once for every step."""
        self._scores.append(_tokens_last([record.scores for record in records]))

    def add_capacity(self, records: Sequence[Routing]) -> None:
        """Add the predictions of a trained step, where the family has a predictor."""
        if self._config.family.thresholds == "predicted":
            self._capacity.append(_tokens_last([r.capacity_logits for r in records if r.capacity_logits is not None]))

    def cutoffs(self) -> Tensor:
        """Return the lowest scores (layers, E) that experts would accept if all tokens competed at once."""
        scores, layers = torch.cat(self._scores, -1), self._config.moe_blocks
        if self._config.family.competition == "call":
            return _kth_largest(scores, layers)
        pairs = scores.flatten(1)
        counts = [pairs_of_pool(scores.shape[-1], each.num_experts, each.capacity) for each in layers]
        lowest = [layer.kthvalue(len(layer) - count + 1).values for layer, count in zip(pairs, counts, strict=True)]
        return torch.stack(lowest)[:, None].expand(scores.shape[:2]).contiguous()

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Return what thresholds of inference (`threshold_candidates`) and cutoffs are moved towards, (layers, E) each.

        Thresholds on predictions are those of the trained steps alone.
        """
        cutoffs = self.cutoffs()
        if self._config.family.thresholds == "predicted":
            return _kth_largest(torch.cat(self._capacity, -1), self._config.moe_blocks).sigmoid(), cutoffs
        return cutoffs, cutoffs


def move_cutoffs(cutoffs: Tensor | None, candidates: Tensor, decay: float) -> Tensor:
    """Return the cutoffs (layers, E) of the next optimizer step; None: there were none, the candidates are the first.

    Else decay * old + (1 - decay) * candidates, the mean over micro-batches and ranks, as thresholds are moved.
    """
    return candidates if cutoffs is None else decay * cutoffs + (1 - decay) * candidates


def _tokens_last(fields: Sequence[Tensor]) -> Tensor:
    """Stack layers x (B, N, E) as (layers, E, B N), detached."""
    return torch.stack([field.detach().flatten(0, 1).t() for field in fields])


def _kth_largest(stacked: Tensor, layers: Sequence[ModelConfig]) -> Tensor:
    """Return the k-th largest values (layers, E) of (layers, E, pool), k being what an expert takes of such a pool.

    In one selection where it is the same in all layers.
    """
    pool = stacked.shape[-1]
    counts = [tokens_per_expert(pool, each.num_experts, each.capacity, each.family.rounding) for each in layers]
    if len(set(counts)) == 1:
        return stacked.kthvalue(pool - counts[0] + 1).values
    return torch.stack([layer.kthvalue(pool - k + 1).values for layer, k in zip(stacked, counts, strict=True)])


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
