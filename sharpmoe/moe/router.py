"""The router of one MoE layer: gate, saliency router, capacity predictor and selection rule, in float32 or better."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.config import ModelConfig
from sharpmoe.moe.half_products import half_product, takes_halves
from sharpmoe.moe.pool import CallPool, Pool
from sharpmoe.moe.routing import CallMode, Routing, score_logits
from sharpmoe.moe.selection import RULES, Ranked, RuleInput, lowest_accepted


class Router(nn.Module):
    """What decides which experts serve which tokens, and with which gates.

    It chooses by the rule of its family (`selection.RULES`); what else a family has (thresholds, a capacity predictor,
    what is a pool) is said by its record (`families.FAMILIES`).
    """

    expert_threshold: Tensor
    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.pool: Pool = CallPool()  # replaced where the tokens of several ranks compete
        num_experts = config.num_experts
        self.gate = _make_gate(config)
        self.saliency_router = SaliencyRouter(config.width, num_experts) if config.saliency_router else None
        predicts = config.family.thresholds == "predicted"
        self.capacity_predictor = _CapacityPredictor(config.gate_width, config.width, num_experts) if predicts else None
        if config.family.thresholds is not None:
            self.register_buffer("expert_threshold", torch.zeros(num_experts))
        if config.bias_balancing:
            self.register_buffer("expert_bias", torch.zeros(num_experts))

    def route(
        self,
        features: Tensor,
        x0_prev_tokens: Tensor | None = None,
        unconditional: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> Routing:
        """Choose experts for B x N tokens. No side effects; communicates where the pool does.

        features (B, N, F): what gate, capacity predictor and heads read. They need not be what the experts are given:
        a gate may read the state before modulation beside the time. x0_prev_tokens (B, N, D): the embedded clean
        latent of the step before, which the saliency router reads; None leaves the base routing. unconditional (B,)
        bool: images without class, where the layer has an expert of their own. mode: with this layer's own routing map
        where a choice is replayed, and its own cutoffs where tokens compete with those of other calls; without
        for_losses the capacity logits, the similarity of prototypes and the layer's own prediction stay None in
        training.
        """
        config = self.config
        # One copy in float32, where any is made: each reader would keep its own for backward.
        read = features if takes_halves(features) and config.gate != "prototypes" else at_least_float32(features)
        gate_logits = self.gate(read)
        logits = gate_logits
        if x0_prev_tokens is not None and self.saliency_router is not None:
            logits = gate_logits + self.saliency_router(x0_prev_tokens)
        scores = score_logits(logits, config.score)
        has_losses = self.training and mode.for_losses
        capacity_logits = None
        if self.capacity_predictor is not None and (has_losses or not self.training):
            capacity_logits = self.capacity_predictor(read)
        cutoff = mode.cutoff if self.training else None
        if mode.replayed is not None:
            choice = Ranked(mode.replayed)
        elif cutoff is not None:
            choice = Ranked(scores.detach() >= cutoff)
        else:
            choice = self._choose(scores.detach(), capacity_logits, mode.pools)
        chosen, accepted = choice
        steering = self._steering(gate_logits, x0_prev_tokens) if has_losses and mode.steering else None
        if unconditional is not None:
            steering = None if steering is None else _send_unconditional(steering, chosen, unconditional)[0]
            scores, chosen = _send_unconditional(scores, chosen, unconditional)
            accepted = None
        return Routing(
            gate_logits=gate_logits,
            logits=logits,
            scores=scores,
            gates=self._gates(scores, chosen),
            routing_map=chosen,
            cutoff=self._cutoff(scores, chosen, accepted) if cutoff is None else cutoff.view(1, 1, -1),
            capacity_logits=capacity_logits,
            similarity=self._similarity(read, chosen, gate_logits) if has_losses else None,
            prediction=self.gate.predict(read) if isinstance(self.gate, _MlpGate) and has_losses else None,
            bias=self.expert_bias.detach().clone() if self._has_bias else None,
            steering=steering,
        )

    def _steering(self, gate_logits: Tensor, x0_prev_tokens: Tensor | None) -> Tensor | None:
        """Return the scores again, cut from all but the saliency router's parameters; None where it adds nothing.

        It is run a second time: its first run also has to send the gradient of other losses into x0_prev_tokens.
        """
        if x0_prev_tokens is None or self.saliency_router is None:
            return None
        logits = gate_logits.detach() + self.saliency_router(x0_prev_tokens.detach())
        return score_logits(logits, self.config.score)

    def _choose(self, scores: Tensor, capacity_logits: Tensor | None, pools: int) -> Ranked:
        """Apply the family's rule to scores (B, N, E), by one top-k where that tells the lowest accepted score too."""
        config, rule = self.config, RULES[self.config.router]
        is_alone = self.pool.is_call or not config.family.pools_calls
        if rule.ranked is not None and (is_alone if self.training else rule.infer is rule.train):
            return rule.ranked(RuleInput(scores), config)
        if self._has_bias:
            scores = scores + self.expert_bias  # for the choice only (arXiv 2408.15664)
        if not self.training:
            thresholds = None if config.family.thresholds is None else self.expert_threshold
            return Ranked(rule.infer(RuleInput(scores, capacity_logits, thresholds, pools), config))
        if config.family.pools_calls:
            return Ranked(self.pool.choose(scores, lambda pooled: rule.train(RuleInput(pooled), config)))
        return Ranked(rule.train(RuleInput(scores), config))

    @property
    def _has_bias(self) -> bool:
        """Whether a bias changes the choice: only token choice has loads that are not even by construction."""
        return self.config.bias_balancing and self.config.family.competition == "token"

    def _cutoff(self, scores: Tensor, chosen: Tensor, accepted: Tensor | None) -> Tensor:
        if accepted is not None:
            return accepted.amin(1, keepdim=True)
        lowest = lowest_accepted(scores, chosen, self.config)
        return self.pool.lowest(lowest) if self.training and self.config.family.pools_calls else lowest

    def _gates(self, scores: Tensor, chosen: Tensor) -> Tensor:
        gates = scores * chosen
        if self.config.renormalises:
            gates = gates / (gates.sum(-1, keepdim=True) + self.config.family.gate_floor)
        return gates if self.config.routed_scale == 1 else gates * self.config.routed_scale

    def _similarity(self, read: Tensor, chosen: Tensor, cosine: Tensor) -> Tensor | None:
        if self.config.gate != "prototypes":
            return None
        routed = chosen[..., : self.config.num_experts]
        return _prototype_similarity(read, routed, cosine, per_image=not self.config.contrasts_calls)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


class _Linear32(nn.Linear):
    """A linear layer that computes in float32 or better, whatever the dtype of input and parameters.

    Routing flips on half-precision ties. Operands in bf16 on CUDA are multiplied without float32 copies of them.
    """

    rounds_gradient = False  # whether such products round the gradient of their result: see `half_product`

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out) float32 (float64 in, float64 out)."""
        if takes_halves(input) and self.weight.dtype == input.dtype:
            out = half_product(input, self.weight, rounds_gradient=self.rounds_gradient)
            return out if self.bias is None else out + self.bias
        bias = None if self.bias is None else at_least_float32(self.bias)
        return functional.linear(at_least_float32(input), at_least_float32(self.weight), bias)


class _HiddenLinear32(_Linear32):
    """The hidden layer of a router, D -> D: large enough that its gradient is that of the rest of the network."""

    rounds_gradient = True


class _PrototypeGate(_Linear32):
    """Cosine of a token to one learned centre per expert (ProMoE's prototypical routing, arXiv 2510.24711)."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__(width, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens (..., D) to cosines (..., E) float32."""
        tokens, centres = at_least_float32(input), at_least_float32(self.weight)
        return functional.linear(functional.normalize(tokens, dim=-1), functional.normalize(centres, dim=-1))


class _MlpGate(nn.Module):
    """Two-layer GELU gate F -> D -> E, whose hidden layer may also feed the layer's own prediction of the target.

    Expert Race (arXiv 2503.16057), section 6: the head shares the first layer with the router.
    """

    def __init__(self, features: int, width: int, num_experts: int, prediction_width: int) -> None:
        super().__init__()
        self.hidden = _HiddenLinear32(features, width)
        self.out = _Linear32(width, num_experts)
        self.head = _Linear32(width, prediction_width) if prediction_width else None

    def forward(self, h: Tensor) -> Tensor:
        """Map features (B, N, F) to logits (B, N, E) float32."""
        logits: Tensor = self.out(functional.gelu(self.hidden(h)))
        return logits

    def predict(self, h: Tensor) -> Tensor | None:
        """Predict the target from features (B, N, F): (B, N, p p C) float32, or None without a head."""
        return None if self.head is None else self.head(functional.gelu(self.hidden(h)))


class SaliencyRouter(nn.Module):
    """Two-layer MLP D -> D -> E on the embedded x0_prev (SharpMoE section 3.1); its output starts at zero.

    With the output layer at zero its logits are exactly 0, so a freshly attached router leaves the model bit-identical.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = _HiddenLinear32(width, width)
        self.out = _Linear32(width, num_experts)

    def forward(self, x0_prev_tokens: Tensor) -> Tensor:
        """Map x0_prev tokens (B, N, D) to saliency logits (B, N, E) float32."""
        logits: Tensor = self.out(functional.silu(self.hidden(x0_prev_tokens)))
        return logits


class _CapacityPredictor(nn.Module):
    """Two-layer SiLU MLP on detached features: how likely each expert is to take each token of a training pool.

    DiffMoE (arXiv 2503.14487), section 3.3.
    """

    def __init__(self, features: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = _HiddenLinear32(features, width)
        self.out = _Linear32(width, num_experts)

    def forward(self, h: Tensor) -> Tensor:
        """Map features (B, N, F) to logits (B, N, E) float32. The input is detached: the trunk does not learn of it."""
        logits: Tensor = self.out(functional.silu(self.hidden(h.detach())))
        return logits


def _make_gate(config: ModelConfig) -> nn.Module:
    """Build the pretrained part of a router."""
    if config.gate == "prototypes":
        return _PrototypeGate(config.gate_width, config.num_experts)
    if config.gate == "mlp":
        prediction_width = config.latent_channels * config.patch_size**2 if config.layer_heads else 0
        return _MlpGate(config.gate_width, config.width, config.num_experts, prediction_width)
    return _Linear32(config.gate_width, config.num_experts, bias=False)


def _prototype_similarity(h: Tensor, routing_map: Tensor, cosine: Tensor, per_image: bool) -> Tensor:
    """Cosine of every expert's centre with the mean of every expert's tokens: (1, E, E), or (B, E, E) per image.

    h (B, N, D) tokens, routing_map (B, N, E) bool, cosine (B, N, E) of token to centre. Columns of experts without
    tokens are NaN. Feeds ProMoE's routing contrastive loss (arXiv 2510.24711, section 4.3); gradients reach tokens and
    centres. The centres themselves are not read: outside of their module ZeRO-3 may have partitioned them.
    """
    tokens, taken = h.to(cosine.dtype), routing_map.to(cosine.dtype)
    along = cosine * tokens.norm(dim=-1, keepdim=True)  # length of the token along each centre
    if not per_image:
        tokens, taken, along = (x.flatten(0, 1).unsqueeze(0) for x in (tokens, taken, along))
    is_idle = (taken.sum(1) == 0).unsqueeze(1)  # (G, 1, E)
    sums = taken.transpose(1, 2) @ tokens  # (G, E, D): the direction of the sum is that of the mean
    length = torch.where(is_idle.transpose(1, 2), 1, sums).norm(dim=-1)
    return (along.transpose(1, 2) @ taken / length.unsqueeze(1)).masked_fill(is_idle, torch.nan)


def _send_unconditional(scores: Tensor, chosen: Tensor, unconditional: Tensor) -> tuple[Tensor, Tensor]:
    """Add the unconditional expert as the last: all tokens of images without class, and only those, with gate one.

    ProMoE's conditional routing (arXiv 2510.24711, section 4.1). scores (B, N, E), chosen (B, N, E) or, replayed,
    (B, N, E + 1); unconditional (B,) bool; returns scores and choices (B, N, E + 1).
    """
    alone = unconditional[:, None, None].expand(*scores.shape[:2], 1)
    routed = chosen[..., : scores.shape[-1]] & ~alone
    return torch.cat([scores.masked_fill(alone, 0), alone.to(scores.dtype)], -1), torch.cat([routed, alone], -1)
