"""The losses. Pure functions of records; nothing here communicates.

What a family's record names (`Family.router_loss`, `Family.head_loss`) is found in two tables, with the weight of each
loss and the fields of `Routing` through which its gradient reaches the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sharpmoe.config import LossConfig
from sharpmoe.latent_patches import patchify
from sharpmoe.moe.routing import Routing


def flow_matching(v: Tensor, v_target: Tensor) -> Tensor:
    """Return the mean squared error of the velocity, 0-d; both (B, C, H, W). SharpMoE section 3, L_FM."""
    return _mean_squared_error(v, v_target)


def _mean_squared_error(value: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error, 0-d, in the wider of the two dtypes: torch 2.11 has no backward for a mixture."""
    dtype = torch.promote_types(value.dtype, target.dtype)
    return functional.mse_loss(value.to(dtype), target.to(dtype))


def routing_mass(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """Return A of one step, (B, N) float32: what the trajectory routing loss sums over the rollout."""
    return _MASSES[config.routing_mass][0](records, config)


def mass_reads(config: LossConfig) -> frozenset[str]:
    """Return the fields of `Routing` through which a gradient of A reaches the network."""
    if config.routing_gradient == "saliency_routers":
        return frozenset({"steering"})
    return _MASSES[config.routing_mass][1]


def _score_mass(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """The paper's: sum over MoE layers and chosen experts of the score, (B, N)."""
    return torch.stack([record.gates.sum(-1) for record in records]).sum(0)


def _count_mass(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """Straight-through counts: experts that took each token, summed over MoE layers, (B, N).

    The value is the exact count. The gradient is that of sum_e sigmoid((score - cutoff) / temperature): the indicator
    itself has none, and a sum of softmax scores cannot grow with the count (their sum over experts is one). With
    routing_gradient "saliency_routers" it goes through `Routing.steering`, which has the same values, or nowhere.
    """
    masses = []
    for record in records:
        scores = record.scores
        if config.routing_gradient == "saliency_routers":
            scores = scores.detach() if record.steering is None else record.steering
        soft = ((scores - record.cutoff) / config.count_temperature).sigmoid().sum(-1)
        masses.append(record.routing_map.sum(-1) + (soft - soft.detach()))
    return torch.stack(masses).sum(0)


_MASSES: dict[str, tuple[Callable[[Sequence[Routing], LossConfig], Tensor], frozenset[str]]] = {
    "scores": (_score_mass, frozenset({"gates"})),
    "counts": (_count_mass, frozenset({"scores"})),
}


def trajectory_routing(mass: Tensor, saliency: Tensor, config: LossConfig, num_terms: int) -> Tensor:
    """Return KL(softmax(mass_scale * A) || softmax(saliency_scale * M)) over the tokens of an image, mean over images.

    SharpMoE's trajectory routing loss. mass A (B, N) is the sum of `num_terms` = steps x MoE layers terms; with
    mass_reduction "mean" it is divided by their number, so that a scale means the same at any depth and T.
    saliency M (B, N) in [0, 1].
    """
    scale = config.mass_scale / (num_terms if config.mass_reduction == "mean" else 1)
    log_p = (scale * mass).log_softmax(-1)
    log_q = (config.saliency_scale * saliency.to(mass.dtype)).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _balance(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """Switch balance loss E * sum_e f_e P_e (arXiv 2101.03961, Eq. 4), summed over MoE layers. 0-d.

    The sum over layers and the weight of 0.01 are what ProMoE's TC applies (its recorded gradients agree to 4e-9).
    """
    per_layer = []
    for record in records:
        share = record.routing_map.flatten(0, 1).to(record.scores.dtype).mean(0)
        share = share / share.sum()  # top_k > 1: the shares still sum to one
        per_layer.append(record.scores.shape[-1] * (share * record.scores.flatten(0, 1).mean(0)).sum())
    return torch.stack(per_layer).sum()


def _contrastive(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """ProMoE's routing contrastive loss (arXiv 2510.24711, section 4.3), summed over MoE layers. 0-d.

    Each centre is pulled to the mean of its own tokens and pushed from the means of the other experts' tokens: cross
    entropy of cosine / temperature, mean over the experts that took tokens.
    """
    temperature = config.contrastive_temperature
    losses = [_contrast(record.similarity, temperature) for record in records if record.similarity is not None]
    return torch.stack(losses).sum()


def _contrast(similarity: Tensor, temperature: float) -> Tensor:
    taken = ~similarity.detach().diagonal(dim1=1, dim2=2).isnan()  # (G, E)
    cosine = torch.where(taken.unsqueeze(1), similarity, 0)
    logits = (cosine / temperature).masked_fill(~taken.unsqueeze(1), -torch.inf)
    own = torch.where(taken, cosine.diagonal(dim1=1, dim2=2) / temperature - logits.logsumexp(-1), 0)
    return -own.sum() / taken.sum().clamp_min(1)


def _router_similarity(records: Sequence[Routing], config: LossConfig) -> Tensor:
    """Expert Race's router similarity loss (arXiv 2503.16057, Eq. 9 to 11), mean over MoE layers.

    0-d, 1 if balanced. With M the choices and P the softmax of the logits over experts, M'M counts how often two
    experts took the same token and weighs P'P: loads (the diagonal) and pairs (the rest) that are frequent cost most.
    """
    losses = []
    for record in records:
        p = record.logits.flatten(0, 1).softmax(-1)
        m = record.routing_map.flatten(0, 1).to(p.dtype)
        together, overlap, num_experts = m.T @ m, p.T @ p, p.shape[1]
        same = torch.eye(num_experts, dtype=torch.bool, device=p.device)
        loads, pairs = together.diagonal(), together.masked_fill(same, 0)
        weight = pairs * (num_experts**2 - num_experts) / pairs.sum().clamp_min(1)
        weight = weight + torch.diag(loads) * num_experts / loads.sum().clamp_min(1)
        losses.append((weight * overlap).sum() / len(p))
    return torch.stack(losses).mean()


def _layer_predictions(records: Sequence[Routing], v_target: Tensor, patch_size: int) -> Tensor:
    """Expert Race's per-layer regularisation (arXiv 2503.16057, section 6): flow loss of each layer's own head. 0-d.

    v_target (B, C, [T,] H, W); the mean over MoE layers.
    """
    predictions = [record.prediction for record in records if record.prediction is not None]
    target = patchify(v_target, patch_size)
    return torch.stack([_mean_squared_error(prediction, target) for prediction in predictions]).mean()


def _capacity(records: Sequence[Routing], v_target: Tensor, patch_size: int) -> Tensor:
    """DiffMoE's capacity loss, 0-d: BCE of the predictor with what experts took, summed over MoE layers."""
    losses = [
        functional.binary_cross_entropy_with_logits(record.capacity_logits, record.routing_map.to(record.scores.dtype))
        for record in records
        if record.capacity_logits is not None
    ]
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class _RouterLoss:
    """A loss on the router, of the records of one step."""

    function: Callable[[Sequence[Routing], LossConfig], Tensor]  # 0-d, unweighted
    weight_key: str  # the key of `LossConfig` that weights it
    reads: frozenset[str]  # fields of `Routing` through which its gradient reaches the network


@dataclass(frozen=True)
class _HeadLoss:
    """A loss on heads beside the router, of the records of one step, v_target (B, C, H, W) and the patch size."""

    function: Callable[[Sequence[Routing], Tensor, int], Tensor]  # 0-d, unweighted
    weight_key: str  # as in `_RouterLoss`
    reads: frozenset[str]  # as in `_RouterLoss`


ROUTER_LOSSES: dict[str, _RouterLoss] = {
    "balance": _RouterLoss(_balance, "balance_weight", frozenset({"scores"})),
    "contrastive": _RouterLoss(_contrastive, "contrastive_weight", frozenset({"similarity"})),
    "similarity": _RouterLoss(_router_similarity, "similarity_weight", frozenset({"logits"})),
}

HEAD_LOSSES: dict[str, _HeadLoss] = {
    "capacity": _HeadLoss(_capacity, "capacity_weight", frozenset({"capacity_logits"})),
    "layers": _HeadLoss(_layer_predictions, "layer_weight", frozenset({"prediction"})),
}
