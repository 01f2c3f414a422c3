"""How much the saliency router decides beside the gate, and whether experts follow saliency: sums of one record.

They are sums over one call, so that calls, steps and ranks add up; `influence_figures` makes figures of them.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.moe.routing import Routing, score_logits
from sharpmoe.moe.selection import RULES, RuleInput

# Below the first, the saliency router is inert: by initialisation it is 0, and a router that has learned at the rate of
# a long-trained gate stayed below it. Above the second it decides nearly alone (docs/design/0010).
_INERT, _TAKES_OVER = 0.1, 3.0

INFLUENCE_COLUMNS = 6  # of `influence`


def choice_of_gate(
    record: Routing,
    config: ModelConfig,
    thresholds: Tensor | None = None,
    *,
    training: bool,
    by_cutoff: bool = False,
) -> Tensor:
    """Return what the family's rule chooses in the same call by the gate's logits alone, (B, N, E) bool.

    thresholds (E,): of the layer, for inference. by_cutoff: in training, experts took what reached `record.cutoff`.
    Without the unconditional expert; no communication.
    """
    scores = score_logits(record.gate_logits, config.score)
    scores = scores if record.bias is None else scores + record.bias
    if training and by_cutoff:
        return scores >= record.cutoff
    if training:
        return RULES[config.router].train(RuleInput(scores), config)
    return RULES[config.router].infer(RuleInput(scores, record.capacity_logits, thresholds), config)


def influence(record: Routing, by_gate: Tensor, saliency: Tensor) -> Tensor:
    """Return sums of every image, (B, 6) float64, without gradient. by_gate: see `choice_of_gate`; saliency (B, N): M.

    Columns: variance over tokens of the saliency router's logits, mean over experts; the same of the gate's; choices
    that the gate alone would not make; choices; correlation of experts per token with M, 0 where it is undefined;
    whether it is defined: neither is the same for all tokens.
    """
    with torch.no_grad():
        chosen = record.routing_map
        variances = [
            x.double().var(1, correction=0).mean(-1) for x in (record.logits - record.gate_logits, record.gate_logits)
        ]
        flipped = (chosen[..., : by_gate.shape[-1]] & ~by_gate).sum((1, 2)).double()
        centred = [x.double() - x.double().mean(1, keepdim=True) for x in (chosen.sum(-1), saliency)]
        norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
        agreement = torch.where(norm > 0, (centred[0] * centred[1]).sum(1) / norm.clamp_min(1e-300), 0)
        return torch.stack([*variances, flipped, chosen.sum((1, 2)).double(), agreement, (norm > 0).double()], 1)


def strength_of(figures: Mapping[str, float]) -> Literal["", "inert", "takes over"]:
    """Return what `influence_figures` say of the saliency routers; "" where they and the gate matter, or unknown."""
    spread = figures.get("spread")
    if spread is None:
        return ""
    return "inert" if spread < _INERT else "takes over" if spread > _TAKES_OVER else ""


def influence_figures(sums: Sequence[float]) -> dict[str, float]:
    """Name the figures of summed `influence`; those without any value are left out.

    spread: standard deviation over tokens of the saliency router's logits over that of the gate's; flipped: share of
    choices that the gate alone would not make; agreement: mean correlation of experts per token with M.
    """
    of_saliency, of_gate, flipped, choices, agreement, defined = sums
    figures = {"spread": (of_saliency, of_gate), "flipped": (flipped, choices), "agreement": (agreement, defined)}
    found = {name: top / bottom for name, (top, bottom) in figures.items() if bottom > 0}
    return found | ({"spread": found["spread"] ** 0.5} if "spread" in found else {})
