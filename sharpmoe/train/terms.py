"""What one optimizer step minimises: the losses of each rollout step, and L_routing of the whole trajectory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe import losses
from sharpmoe.config import VARYING_COMPUTE, RunConfig
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import StepOutput


class LossTerms(NamedTuple):
    """The loss and its parts before weighting, each 0-d, mean over the micro-batch and the rollout."""

    total: Tensor
    flow: Tensor
    routing: Tensor
    balance: Tensor  # the family's own loss on its router: Switch balance, ProMoE's contrast, Expert Race's similarity
    capacity: Tensor  # heads beside the router: DiffMoE's capacity predictor, Expert Race's per-layer predictions


class StepTerms(NamedTuple):
    """The losses of one rollout step, each 0-d, and its share of the routing mass."""

    total: Tensor  # weighted, without L_routing
    flow: Tensor
    balance: Tensor
    capacity: Tensor
    mass: Tensor | None  # (B, N) the step's summand of A; None where L_routing does not apply

    def detach(self) -> "StepTerms":
        """Return the same, cut from the graph."""
        return StepTerms(*(None if term is None else term.detach() for term in self))  # type: ignore[arg-type]


def step_terms(output: StepOutput, run: RunConfig) -> StepTerms:
    """Losses of one step."""
    zero = torch.zeros_like(output.flow)
    balance = router_loss(output.routing, run) if has_router_loss(run) else zero
    capacity = zero
    if run.model.router == "diffmoe":
        capacity = losses.capacity(output.routing)
    elif run.model.layer_heads and output.layer_flow is not None:
        capacity = output.layer_flow
    heads_weight = run.loss.layer_weight if run.model.layer_heads else run.loss.capacity_weight
    total = output.flow + router_weight(run) * balance + heads_weight * capacity
    return StepTerms(total, output.flow, balance, capacity, step_mass(output.routing, run))


def step_mass(records: Sequence[Routing], run: RunConfig) -> Tensor | None:
    """One step's summand of A (B, N); None where L_routing does not apply."""
    return losses.routing_mass(records, run.loss) if has_routing_loss(run) else None


def has_routing_loss(run: RunConfig) -> bool:
    """Whether the trajectory routing loss applies: not for token choice, where all tokens get the same compute."""
    return run.stage == "posttrain" and run.model.router in VARYING_COMPUTE and run.loss.routing_weight > 0


def has_router_loss(run: RunConfig) -> bool:
    """Whether the family has a loss on its router; loads balanced by a bias need none, and expert choice neither."""
    return run.model.router in ("promoe_tc", "promoe_ec", "race") or (
        run.model.router in ("tc", "dit_moe") and not run.model.bias_balancing
    )


def router_loss(records: Sequence[Routing], run: RunConfig) -> Tensor:
    """The family's own loss on its router at one step, 0-d, unweighted."""
    if run.model.router == "race":
        return losses.router_similarity(records)
    if run.model.gate == "prototypes":
        return losses.contrastive(records, run.loss.contrastive_temperature)
    return losses.balance(records)


def router_weight(run: RunConfig) -> float:
    """Weight of `router_loss`."""
    if run.model.router == "race":
        return run.loss.similarity_weight
    return run.loss.contrastive_weight if run.model.gate == "prototypes" else run.loss.balance_weight


def routing_loss(mass: Tensor, saliency: Tensor, run: RunConfig) -> Tensor:
    """L_routing of a trajectory (0-d, unweighted): A (B, N) summed over all steps, against the map M (B, N)."""
    layers = sum(run.model.is_moe(block) for block in range(run.model.depth))
    return losses.trajectory_routing(mass, saliency, run.loss, run.rollout.num_steps * layers)


def mass_gradient(mass: Tensor | None, saliency: Tensor, run: RunConfig) -> Tensor | None:
    """Return w = routing_weight * dL_routing / dA (B, N) at a whole trajectory's A; None without a routing loss."""
    if mass is None:
        return None
    with torch.enable_grad():
        leaf = mass.detach().requires_grad_()
        return torch.autograd.grad(run.loss.routing_weight * routing_loss(leaf, saliency, run), leaf)[0]
