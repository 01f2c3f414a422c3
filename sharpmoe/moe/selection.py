"""Selection rules: which experts take which tokens. One entry per family, for training and inference.

Rules are pure. B images, N tokens per image, E experts; a rule maps scores (B, N, E) to choices (B, N, E) bool. The
batch that a rule gets is its pool: a pool of several ranks (`moe.pool`) gathers their scores and applies the rule to
all of them. A choice is a set, so no top-k is asked for its order, which is a sort of its own on CUDA.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.families import Rounding, pairs_of_pool, tokens_per_expert


class RuleInput(NamedTuple):
    """What a rule reads. Detached: no choice has a gradient."""

    scores: Tensor  # (B, N, E) float32, with the bias that balances loads where there is one
    capacity_logits: Tensor | None = None  # (B, N, E) float32, in inference with thresholds on predictions
    thresholds: Tensor | None = None  # (E,) float32, of families that infer by thresholds
    pools: int = 1  # equal parts of the batch, each a pool of its own, where inference ranks the tokens of a pool


Select = Callable[[RuleInput, ModelConfig], Tensor]


class Ranked(NamedTuple):
    """A choice, and the scores that one top-k found with it."""

    routing_map: Tensor  # (B, N, E) bool
    accepted: Tensor | None = None  # (B or 1, K, E) of the K tokens that each expert of a pool took, in no order


class Rule(NamedTuple):
    """How a family chooses. `train` reads the scores only: metrics apply it to the gate's scores alone.

    `ranked`: the same choice as `train`, for families whose experts take a fixed number of tokens.
    """

    train: Select
    infer: Select
    ranked: Callable[[RuleInput, ModelConfig], Ranked] | None = None


def _token_choice(given: RuleInput, config: ModelConfig) -> Tensor:
    return _top_experts(given.scores, config.top_k)


def _group_limited(given: RuleInput, config: ModelConfig) -> Tensor:
    """Each token takes its top-k experts among those of its best `top_groups` groups (DeepSeek-V3, arXiv 2412.19437).

    A group is worth the sum of its two best experts. Experts outside count as 0, as in the published code, so that one
    of them may win where a bias made the inside negative.
    """
    if config.top_groups == config.num_groups:
        return _token_choice(given, config)
    groups = given.scores.unflatten(-1, (config.num_groups, -1))
    worth = groups.topk(2, dim=-1, sorted=False).values.sum(-1)
    best = worth.topk(config.top_groups, dim=-1, sorted=False).indices
    inside = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
    return _top_experts(groups.masked_fill(~inside.unsqueeze(-1), 0).flatten(-2), config.top_k)


def _ranked_by_image(given: RuleInput, config: ModelConfig) -> Ranked:
    """Per image, each expert takes its top N / E * capacity tokens (EC-DiT, arXiv 2410.02098)."""
    return _ranked_tokens(given.scores, config.capacity, config.family.rounding)


def _expert_choice(given: RuleInput, config: ModelConfig) -> Tensor:
    return _ranked_by_image(given, config).routing_map


def _ranked_by_call(given: RuleInput, config: ModelConfig) -> Ranked:
    """Each expert takes its top B N / E * capacity tokens of the whole batch (DiffMoE training, arXiv 2503.14487)."""
    scores = given.scores
    one_pool = scores.reshape(1, -1, scores.shape[-1])
    chosen, accepted = _ranked_tokens(one_pool, config.capacity, config.family.rounding)
    return Ranked(chosen.view(scores.shape), accepted)


def _batch_pool(given: RuleInput, config: ModelConfig) -> Tensor:
    return _ranked_by_call(given, config).routing_map


def _predicted_capacity(given: RuleInput, config: ModelConfig) -> Tensor:
    """DiffMoE inference: a token counts for an expert where its predicted probability exceeds the expert's threshold.

    "mask" is the paper's Eq. 14: an expert takes exactly the tokens that count for it. "count" is what ProMoE's code
    does: of each pool, it takes as many tokens as count, those with its highest scores.
    """
    assert given.capacity_logits is not None
    assert given.thresholds is not None  # the router of this family has a predictor and thresholds
    counts = given.capacity_logits.sigmoid() > given.thresholds
    if config.capacity_selection == "mask":
        return counts
    pooled = given.scores.reshape(given.pools, -1, given.scores.shape[-1])
    count = counts.reshape(pooled.shape).sum(1, keepdim=True)  # (pools, 1, E)
    best_first = pooled.argsort(dim=1, descending=True, stable=True)
    is_taken = torch.arange(pooled.shape[1], device=pooled.device)[:, None] < count  # (pools, rank, E)
    return torch.zeros_like(is_taken).scatter_(1, best_first, is_taken).view(given.scores.shape)


def _race(given: RuleInput, config: ModelConfig) -> Tensor:
    """All pairs of token and expert compete, the best B N * capacity win (Expert Race training, arXiv 2503.16057)."""
    scores = given.scores
    count = pairs_of_pool(scores.shape[0] * scores.shape[1], scores.shape[2], config.capacity)
    chosen = scores.flatten().topk(count, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).flatten().scatter_(0, chosen, True).view(scores.shape)


def _above_threshold(given: RuleInput, config: ModelConfig) -> Tensor:
    """Expert Race inference: all pairs whose score reaches the expert's threshold."""
    assert given.thresholds is not None
    return given.scores >= given.thresholds


RULES: dict[str, Rule] = {
    "tc": Rule(_token_choice, _token_choice),
    "promoe_tc": Rule(_token_choice, _token_choice),
    "dit_moe": Rule(_token_choice, _token_choice),
    "dsmoe": Rule(_group_limited, _group_limited),
    "ec": Rule(_expert_choice, _expert_choice, _ranked_by_image),
    "promoe_ec": Rule(_expert_choice, _expert_choice, _ranked_by_image),
    "diffmoe": Rule(_batch_pool, _predicted_capacity, _ranked_by_call),
    "race": Rule(_race, _above_threshold),
    "nucleus": Rule(_expert_choice, _expert_choice, _ranked_by_image),
}


def lowest_accepted(scores: Tensor, routing_map: Tensor, config: ModelConfig) -> Tensor:
    """Return the lowest score that each expert accepted where it chose. Detached.

    (B, 1, E) where an image is the pool, (1, 1, E) where the call is; if all experts compete, the lowest of all of
    them, for each. An expert without tokens gets +inf: nothing is near its threshold.
    """
    accepted = scores.detach().masked_fill(~routing_map, torch.inf)
    competition = config.family.competition
    if competition not in ("call", "all"):
        return accepted.amin(dim=1, keepdim=True)
    lowest = accepted.amin(dim=(0, 1) if competition == "call" else (0, 1, 2), keepdim=True)
    return lowest.expand(1, 1, scores.shape[-1])


def _top_experts(scores: Tensor, top_k: int) -> Tensor:
    chosen = scores.topk(top_k, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def _top_tokens(scores: Tensor, capacity: float, rounding: Rounding = "down") -> Tensor:
    return _ranked_tokens(scores, capacity, rounding).routing_map


def _ranked_tokens(scores: Tensor, capacity: float, rounding: Rounding = "down") -> Ranked:
    count = tokens_per_expert(scores.shape[1], scores.shape[2], capacity, rounding)
    top = scores.topk(count, dim=1, sorted=False)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices, True)
    return Ranked(chosen, top.values)
