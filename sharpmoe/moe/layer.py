"""One MoE layer: route -> select -> dispatch -> experts -> combine."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.moe.capacity import CapacityPredictor
from sharpmoe.moe.dispatch import Dispatcher, LocalDispatcher
from sharpmoe.moe.experts import Experts
from sharpmoe.moe.router import Linear32, SaliencyRouter
from sharpmoe.moe.routing import (
    Routing,
    batch_pool,
    expert_choice,
    lowest_accepted,
    predicted_count,
    predicted_mask,
    token_choice,
    tokens_per_expert,
)


def select_tc(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None) -> Tensor:
    """Token choice: the same in training and inference."""
    return token_choice(scores, layer.config.top_k)


def select_ec(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None) -> Tensor:
    """Expert choice: the same in training and inference."""
    return expert_choice(scores, layer.config.capacity)


def select_diffmoe(layer: "MoELayer", scores: Tensor, capacity_logits: Tensor | None) -> Tensor:
    """DiffMoE: the batch pool in training, the predicted capacity in inference."""
    if layer.training:
        return batch_pool(scores, layer.config.capacity)
    assert capacity_logits is not None  # the layer of this family has a predictor
    if layer.config.capacity_selection == "mask":
        return predicted_mask(capacity_logits, layer.expert_threshold)
    return predicted_count(scores, capacity_logits, layer.expert_threshold)


SELECTION: dict[str, Callable[["MoELayer", Tensor, Tensor | None], Tensor]] = {
    "tc": select_tc,
    "ec": select_ec,
    "diffmoe": select_diffmoe,
}


class MoELayer(nn.Module):
    """Mixture of expert MLPs in place of a block's MLP; the router family is a field of the configuration."""

    expert_threshold: Tensor

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.config = config
        self.dispatcher = LocalDispatcher() if dispatcher is None else dispatcher
        width, num_experts = config.width, config.num_experts
        self.gate = Linear32(width, num_experts, bias=False)
        self.saliency_router = SaliencyRouter(width, num_experts) if config.saliency_router else None
        self.capacity_predictor = CapacityPredictor(width, num_experts) if config.router == "diffmoe" else None
        self.experts = Experts(num_experts, width, int(width * config.mlp_ratio))
        if config.router == "diffmoe":
            self.register_buffer("expert_threshold", torch.zeros(num_experts))

    def forward(
        self, h: Tensor, guidance_tokens: Tensor | None = None, routing_map: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record. No side effects.

        guidance_tokens (B, N, D): the embedded guidance latent; None leaves the base routing. routing_map (B, N, E):
        replay this choice instead of making one (two-pass training in half precision, where a near-tie can flip).
        """
        gate_logits = self.gate(h)
        logits = gate_logits
        if guidance_tokens is not None and self.saliency_router is not None:
            logits = gate_logits + self.saliency_router(guidance_tokens)
        scores = logits.softmax(-1)
        capacity_logits = None if self.capacity_predictor is None else self.capacity_predictor(h)
        if routing_map is None:
            routing_map = self.select(scores.detach(), capacity_logits)
        gates = scores * routing_map
        y = self.dispatcher(
            h.flatten(0, 1), routing_map.flatten(0, 1), gates.flatten(0, 1), self.experts, self._static_count(h)
        )
        cutoff = lowest_accepted(scores, routing_map, per_image=self.config.router != "diffmoe")
        return y.view_as(h), Routing(gate_logits, logits, scores, gates, routing_map, cutoff, capacity_logits)

    def select(self, scores: Tensor, capacity_logits: Tensor | None) -> Tensor:
        """Choose experts for scores (B, N, E) by this layer's family: (B, N, E) bool."""
        return SELECTION[self.config.router](self, scores, capacity_logits)

    def _static_count(self, h: Tensor) -> int | None:
        """Rows per expert where the rule fixes them, else None. A replayed map comes from the same rule."""
        batch, tokens, _ = h.shape
        experts, capacity = self.config.num_experts, self.config.capacity
        if self.config.router == "ec":
            return batch * tokens_per_expert(tokens, experts, capacity)
        if self.config.router == "diffmoe" and self.training:
            return tokens_per_expert(batch * tokens, experts, capacity)
        return None
