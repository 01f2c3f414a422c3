"""One MoE layer: route -> select -> dispatch -> experts -> combine."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sharpmoe.config import POOLED, TOKEN_CHOICE, ModelConfig
from sharpmoe.moe.capacity import CapacityPredictor
from sharpmoe.moe.dispatch import Dispatcher, LocalDispatcher
from sharpmoe.moe.experts import Experts, feed_forward
from sharpmoe.moe.pool import CallPool, Pool
from sharpmoe.moe.router import MlpGate, SaliencyRouter, at_least_float32, make_gate
from sharpmoe.moe.routing import (
    Routing,
    batch_pool,
    expert_choice,
    group_limited,
    lowest_accepted,
    predicted_count,
    predicted_mask,
    prototype_similarity,
    race,
    score_logits,
    token_choice,
    tokens_per_expert,
)


def select_tc(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Tensor:
    """Token choice, by biased scores where loads are balanced by a bias: the same in training and inference."""
    return token_choice(layer.biased(scores), layer.config.top_k)


def select_dsmoe(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Tensor:
    """Group-limited token choice by biased scores (DSMoE, arXiv 2512.01252): the same in training and inference."""
    config = layer.config
    return group_limited(layer.biased(scores), config.top_k, config.num_groups, config.top_groups)


def select_ec(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Tensor:
    """Expert choice: the same in training and inference."""
    return expert_choice(scores, layer.config.capacity)


def select_diffmoe(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Tensor:
    """DiffMoE: the batch pool in training, the predicted capacity in inference."""
    if layer.training:
        return layer.pool.choose(scores, partial(batch_pool, capacity=layer.config.capacity))
    assert capacity_logits is not None  # the layer of this family has a predictor
    if layer.config.capacity_selection == "mask":
        return predicted_mask(capacity_logits, layer.expert_threshold)
    return predicted_count(scores, capacity_logits, layer.expert_threshold, pools)


def select_race(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Tensor:
    """Expert Race: the best pairs of the call in training, all above the averaged threshold in inference."""
    if layer.training:
        return layer.pool.choose(scores, partial(race, capacity=layer.config.capacity))
    return scores >= layer.expert_threshold


SELECTION: dict[str, Callable[["MoELayer", Tensor, Tensor | None, int], Tensor]] = {
    "tc": select_tc,
    "promoe_tc": select_tc,
    "dit_moe": select_tc,
    "dsmoe": select_dsmoe,
    "ec": select_ec,
    "promoe_ec": select_ec,
    "diffmoe": select_diffmoe,
    "race": select_race,
}
CUTOFF_POOL = {"diffmoe": "call", "race": "all"}  # the others accept within an image


class MoELayer(nn.Module):
    """Mixture of expert MLPs in place of a block's MLP; the router family is a field of the configuration."""

    expert_threshold: Tensor
    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dispatcher: Dispatcher = LocalDispatcher()  # both are replaced where several ranks share the work
        self.pool: Pool = CallPool()
        width, num_experts = config.width, config.num_experts
        prediction_width = config.latent_channels * config.patch_size**2 if config.layer_heads else 0
        self.gate = make_gate(config.gate, width, num_experts, prediction_width)
        self.saliency_router = SaliencyRouter(width, num_experts) if config.saliency_router else None
        self.capacity_predictor = CapacityPredictor(width, num_experts) if config.router == "diffmoe" else None
        self.experts = Experts(config.total_experts, width, config.expert_width, config.expert)
        self.shared = None if config.shared == "none" else feed_forward(config.shared, width, config.shared_width)
        if config.router in POOLED:
            self.register_buffer("expert_threshold", torch.zeros(num_experts))
        if config.bias_balancing:
            self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(
        self,
        h: Tensor,
        x0_prev_tokens: Tensor | None = None,
        routing_map: Tensor | None = None,
        unconditional: Tensor | None = None,
        pools: int = 1,
        for_losses: bool = True,
    ) -> tuple[Tensor, Routing]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record. No side effects.

        x0_prev_tokens (B, N, D): the embedded x0_prev; None leaves the base routing. routing_map (B, N, E):
        replay this choice instead of making one (two-pass training in half precision, where a near-tie can flip).
        unconditional (B,) bool: images without class, where the layer has an expert of their own. pools: equal parts
        of the batch in which DiffMoE counts and ranks its tokens apart in inference; no other choice depends on it.
        for_losses: in training, make what only losses and thresholds read (capacity logits, similarity of prototypes,
        the layer's own prediction); for a first pass, whose steps are run again, those fields stay None.
        """
        h32 = at_least_float32(h)  # routers read one copy; in half precision each would keep its own for backward
        gate_logits = self.gate(h32)
        logits = gate_logits
        if x0_prev_tokens is not None and self.saliency_router is not None:
            logits = gate_logits + self.saliency_router(x0_prev_tokens)
        scores = score_logits(logits, self.config.score)
        has_losses = self.training and for_losses
        capacity_logits = None
        if self.capacity_predictor is not None and (has_losses or not self.training):
            capacity_logits = self.capacity_predictor(h32)
        chosen = self.select(scores.detach(), capacity_logits, pools) if routing_map is None else routing_map
        if unconditional is not None:
            scores, chosen = send_unconditional(scores, chosen, unconditional)
        gates = self._gates(scores, chosen)
        record = Routing(
            gate_logits,
            logits,
            scores,
            gates,
            chosen,
            self._cutoff(scores, chosen),
            capacity_logits,
            self._similarity(h32, chosen, gate_logits) if has_losses else None,
            self.gate.predict(h32) if isinstance(self.gate, MlpGate) and has_losses else None,
            self.expert_bias.detach().clone() if self.config.bias_balancing else None,
        )
        return self._serve(h, record), record

    def select(self, scores: Tensor, capacity_logits: Tensor | None, pools: int = 1) -> Tensor:
        """Choose experts for scores (B, N, E) by this layer's family: (B, N, E) bool."""
        return SELECTION[self.config.router](self, scores, capacity_logits, pools)

    def biased(self, scores: Tensor) -> Tensor:
        """Scores as the choice sees them: with the load-balancing bias (arXiv 2408.15664), where there is one."""
        return scores + self.expert_bias if self.config.bias_balancing else scores

    def _cutoff(self, scores: Tensor, chosen: Tensor) -> Tensor:
        pool = CUTOFF_POOL.get(self.config.router, "image")
        lowest = lowest_accepted(scores, chosen, pool)
        return self.pool.lowest(lowest) if pool != "image" and self.training else lowest

    def _gates(self, scores: Tensor, chosen: Tensor) -> Tensor:
        gates = scores * chosen
        if self.config.renormalise and self.config.top_k > 1:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates if self.config.routed_scale == 1 else gates * self.config.routed_scale

    def _similarity(self, h: Tensor, chosen: Tensor, cosine: Tensor) -> Tensor | None:
        if self.config.gate != "prototypes":
            return None
        routed, per_image = chosen[..., : self.config.num_experts], self.config.router not in TOKEN_CHOICE
        return prototype_similarity(h, routed, cosine, per_image)

    def _serve(self, h: Tensor, record: Routing) -> Tensor:
        tokens, chosen, gates = (part.flatten(0, 1) for part in (h, record.routing_map, record.gates))
        total = self._static_total(h, record)
        y = self.dispatcher(tokens, chosen, gates, self.experts, self._static_count(h), total).view_as(h)
        return y if self.shared is None else y + self.shared(h)

    def _static_count(self, h: Tensor) -> int | None:
        """Rows per expert where the rule fixes them, else None. A replayed map comes from the same rule."""
        batch, tokens, _ = h.shape
        experts, capacity = self.config.num_experts, self.config.capacity
        if self.config.router == "ec":
            return batch * tokens_per_expert(tokens, experts, capacity)
        if self.config.router == "diffmoe" and self.training and self.pool.is_call:
            return tokens_per_expert(batch * tokens, experts, capacity)
        return None

    def _static_total(self, h: Tensor, record: Routing) -> int | None:
        """Rows of all experts together where the rule fixes them: every token takes top_k experts, else None."""
        goes_apart = record.routing_map.shape[-1] > self.config.num_experts  # images without class: to one expert
        if self.config.router not in TOKEN_CHOICE or (goes_apart and self.config.top_k > 1):
            return None
        return h.shape[0] * h.shape[1] * self.config.top_k


def send_unconditional(scores: Tensor, chosen: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
    """Add the unconditional expert as the last: all tokens of images without class, and only those, with gate one.

    ProMoE's conditional routing (arXiv 2510.24711, section 4.1). scores (B, N, E), chosen (B, N, E) or, replayed,
    (B, N, E + 1); unconditional (B,) bool; returns scores and choices (B, N, E + 1).
    """
    alone = unconditional[:, None, None].expand(*scores.shape[:2], 1)
    routed = chosen[..., : scores.shape[-1]] & ~alone
    return torch.cat([scores.masked_fill(alone, 0), alone.to(scores.dtype)], -1), torch.cat([routed, alone], -1)
