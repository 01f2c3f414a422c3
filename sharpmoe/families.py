"""Router families: one record each, which says what competes for what and what follows from it. No torch.

A family is a record here and a rule in `sharpmoe.moe.selection`; nothing else knows it by name. The layer, the losses,
FLOP counts, the planner and sampling read the record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

# How many rows each competition fixes by itself, where no threshold decides: see `Family.fixed_rows`.
_OVER_CALLS = ("call", "all")
Rounding = Literal["down", "up"]
_FIXED: dict[str, Literal["each", "total"]] = {"token": "total", "image": "each", "call": "each", "all": "total"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A router family.

    `competition` is who competes for what: "token": the experts for each token, which takes its `top_k` best; "image":
    the tokens of an image for each expert; "call": the tokens of a whole call for each expert; "all": all pairs of
    token and expert of a call. None: the family has no experts. In all but "token" an expert takes tokens by
    `capacity`, the mean number of experts per token, so that a token may get more or less compute.
    """

    competition: Literal["token", "image", "call", "all"] | None
    # What competes in inference, where that differs from training and no threshold decides.
    inference: Literal["token", "image"] | None = None
    # Key of `losses.ROUTER_LOSSES`; see `ModelConfig.router_loss`, which knows what replaces it.
    router_loss: Literal["balance", "contrastive", "similarity"] | None = None
    # Key of `losses.HEAD_LOSSES` of a head that comes with the family; see `ModelConfig.head_loss`.
    head_loss: Literal["capacity"] | None = None
    # Inference chooses by a threshold per expert, a moving average of the lowest that training accepted: "predicted":
    # of probabilities of a capacity predictor; "accepted": of scores.
    thresholds: Literal["predicted", "accepted"] | None = None
    # Of the tokens that an expert takes, where capacity times tokens over experts is no whole number.
    rounding: Rounding = "down"
    # Added to the sum that gates are divided by where they are renormalised.
    gate_floor: float = 1e-20
    published: Mapping[str, Any] = field(default_factory=dict)  # model fields that differ from their defaults
    published_widths: Mapping[str, int] = field(default_factory=dict)  # the same, in multiples of `width`

    @property
    def has_experts(self) -> bool:
        return self.competition is not None

    @property
    def varies_compute(self) -> bool:
        """Whether a token may get more or fewer experts than another, so that the trajectory routing loss applies."""
        return self.competition in ("image", "call", "all")

    @property
    def pools_calls(self) -> bool:
        """Whether tokens of different images compete in training: `parallel.pool_scope` then has a meaning."""
        return self.competition in _OVER_CALLS

    def competition_in(self, training: bool) -> Literal["token", "image", "call", "all"] | None:
        """Return `competition` in training or in inference; None where thresholds decide instead."""
        if training:
            return self.competition
        return None if self.thresholds is not None else (self.inference or self.competition)

    def fixed_rows(self, training: bool) -> Literal["each", "total"] | None:
        """Return which row counts the rule fixes whatever the scores: of each expert, of all together, or none.

        In inference a call may be cut into pools, so that a competition over calls fixes nothing.
        """
        competition = self.competition_in(training)
        if competition is None or (competition in _OVER_CALLS and not training):
            return None
        return _FIXED[competition]

    def model_fields(self, width: int) -> dict[str, Any]:
        """Return the fields of `ModelConfig` in which the published models of this family differ from the defaults."""
        return {**self.published, **{key: times * width for key, times in self.published_widths.items()}}


_PROMOE: dict[str, Any] = {
    "router_loss": "contrastive",
    "published": {"gate": "prototypes", "score": "identity", "unconditional_expert": True, "shared": "gelu"},
    "published_widths": {"expert_hidden": 2, "shared_hidden": 2},
}

FAMILIES: dict[str, Family] = {
    "dense": Family(competition=None),
    "tc": Family(competition="token", router_loss="balance"),  # Switch, arXiv 2101.03961; TC-DiT of 2510.24711
    "ec": Family(competition="image"),  # EC-DiT, arXiv 2410.02098
    "diffmoe": Family(competition="call", head_loss="capacity", thresholds="predicted"),  # arXiv 2503.14487
    "promoe_tc": Family(competition="token", **_PROMOE),  # arXiv 2510.24711
    "promoe_ec": Family(competition="image", **_PROMOE),
    "dsmoe": Family(  # arXiv 2512.01252; a bias balances the loads
        competition="token",
        published={
            "score": "sigmoid",
            "top_k": 2,
            "renormalise": True,
            "routed_scale": 2.0,
            "bias_balancing": True,
            "expert": "swiglu",
            "shared": "swiglu",
            "mlp": "silu",
            "positions": "rope_2d",
        },
        published_widths={"expert_hidden": 2, "shared_hidden": 2},
    ),
    "dit_moe": Family(  # arXiv 2407.11633
        competition="token",
        router_loss="balance",
        published={"top_k": 2, "expert": "swiglu", "shared": "swiglu", "moe_every": 1},
        published_widths={"shared_hidden": 2},
    ),
    "race": Family(  # Expert Race, arXiv 2503.16057
        competition="all",
        router_loss="similarity",
        thresholds="accepted",
        published={"gate": "mlp", "score": "identity", "layer_heads": True},
    ),
    "nucleus": Family(  # arXiv 2604.12163
        competition="image",
        rounding="up",
        gate_floor=1e-12,
        published={
            "backbone": "nucleus",
            "gate_input": "time_and_state",
            "renormalise": True,
            "routed_scale": 2.5,
            "expert": "swiglu",
            "shared": "swiglu",
            "mlp": "swiglu",
            "moe_every": 1,
            "dense_first": 3,
            "latent_channels": 16,
            "text_width": 4096,
        },
    ),
}


class _RoutedModel(Protocol):
    """The fields of `ModelConfig` that row counts of one MoE layer depend on (`ModelConfig.of_block`)."""

    @property
    def family(self) -> Family: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def capacity(self) -> float: ...
    @property
    def unconditional_expert(self) -> bool: ...


def tokens_per_expert(num_pooled: int, num_experts: int, capacity: float, rounding: Rounding = "down") -> int:
    """Return how many of `num_pooled` tokens each expert takes: num_pooled / E * capacity, rounded, at least one.

    The tokens are those of the call: an image of another grid has another capacity, rounded by itself. The rounding
    changes it by less than one token per expert and pool. The two roundings multiply in the order of their
    publications, which decides where a product of floats is just above or below a whole number.
    """
    if rounding == "up":
        return max(1, math.ceil(capacity * num_pooled / num_experts))
    return max(1, int(num_pooled / num_experts * capacity))


def pairs_of_pool(num_pooled: int, num_experts: int, capacity: float) -> int:
    """Return how many pairs win where all pairs of `num_pooled` tokens and E experts compete: floor(pool * capacity).

    At least one, at most all.
    """
    return min(num_pooled * num_experts, max(1, int(num_pooled * capacity)))


def rows_of_call(model: _RoutedModel, images: int, tokens: int) -> int:
    """Return the rows that the routed experts of one MoE layer compute together in a training call.

    A call has `images` images of `tokens` tokens. All have a class: those without one go to the unconditional expert,
    where there is one.
    """
    competition, pool = model.family.competition, images * tokens
    if competition is None:
        return 0
    if competition == "token":
        return pool * model.top_k
    if competition == "all":
        return pairs_of_pool(pool, model.num_experts, model.capacity)
    pools = 1 if competition == "call" else images
    each = tokens_per_expert(pool // pools, model.num_experts, model.capacity, model.family.rounding)
    return pools * model.num_experts * each


def rows_per_expert(
    model: _RoutedModel, images: int, tokens: int, *, training: bool, pool_is_call: bool = True
) -> int | None:
    """Return the rows that every expert of a layer computes in a call, where the rule fixes them, else None.

    A call has `images` images of `tokens` tokens. A pool over ranks undoes it (an expert's share of one rank varies),
    and so does an unconditional expert, which takes as many images as have no class.
    """
    family, experts = model.family, model.num_experts
    if family.fixed_rows(training) != "each" or model.unconditional_expert:
        return None
    if family.competition_in(training) == "image":
        return images * tokens_per_expert(tokens, experts, model.capacity, family.rounding)
    return tokens_per_expert(images * tokens, experts, model.capacity, family.rounding) if pool_is_call else None


def total_rows(
    model: _RoutedModel, images: int, tokens: int, *, training: bool, pool_is_call: bool = True, is_replay: bool = False
) -> int | None:
    """Return the rows of all experts of a layer together in a call, where the rule fixes their sum, else None.

    As in `rows_per_expert`; an unconditional expert takes one row per token, as a token's choice of one does.
    is_replay: the choices are those of earlier calls, which may be merged into one: where all pairs of a call compete,
    the floor of the whole need not be the sum of the floors of its parts.
    """
    each = rows_per_expert(model, images, tokens, training=training, pool_is_call=pool_is_call)
    if each is not None:
        return each * model.num_experts
    if model.family.fixed_rows(training) != "total":
        return None
    if model.family.competition_in(training) == "token":
        return None if model.unconditional_expert and model.top_k > 1 else images * tokens * model.top_k
    is_fixed = pool_is_call and not is_replay and not model.unconditional_expert
    return pairs_of_pool(images * tokens, model.num_experts, model.capacity) if is_fixed else None
