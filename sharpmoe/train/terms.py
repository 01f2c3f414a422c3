"""What one optimizer step minimises: the losses of each rollout step, and L_routing of the trajectory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe import losses
from sharpmoe.config import RunConfig
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import StepOutput


class LossTerms(NamedTuple):
    """The loss and its parts before weighting: five 0-d tensors, mean over the micro-batch and the rollout."""

    total: Tensor
    flow: Tensor
    routing: Tensor
    router: Tensor  # the family's own loss on its router: one of `losses.ROUTER_LOSSES`, or zero
    heads: Tensor  # loss of heads other than the router's: one of `losses.HEAD_LOSSES`, or zero


class StepTerms(NamedTuple):
    """The losses of one rollout step, each 0-d, and its share of the routing mass."""

    total: Tensor  # weighted, without L_routing
    flow: Tensor
    router: Tensor
    heads: Tensor
    mass: Tensor | None  # (B, N) the step's summand of A; None if L_routing does not apply

    def detach(self) -> "StepTerms":
        """Return the same terms, detached."""
        return StepTerms(*(None if term is None else term.detach() for term in self))  # type: ignore[arg-type]


def step_terms(output: StepOutput, run: RunConfig) -> StepTerms:
    """Return the losses of one step of a rollout in training, with their graph."""
    zero, records, weights = torch.zeros_like(output.flow), output.routing, run.loss
    router, heads, total = zero, zero, output.flow
    if records and run.model.router_loss is not None:
        router_loss = losses.ROUTER_LOSSES[run.model.router_loss]
        router = router_loss.function(records, weights)
        total = total + getattr(weights, router_loss.weight_key) * router
    if records and run.model.head_loss is not None:
        head_loss = losses.HEAD_LOSSES[run.model.head_loss]
        heads = head_loss.function(records, output.v_target, run.model.patch_size)
        total = total + getattr(weights, head_loss.weight_key) * heads
    return StepTerms(total=total, flow=output.flow, router=router, heads=heads, mass=step_mass(records, run))


def step_mass(records: Sequence[Routing], run: RunConfig) -> Tensor | None:
    """Return one step's summand of A (B, N); None if L_routing does not apply."""
    return losses.routing_mass(records, run.loss) if has_routing_loss(run) else None


def has_routing_loss(run: RunConfig) -> bool:
    """Whether the trajectory routing loss applies: in post-training, if tokens can get different amounts of compute."""
    return run.stage == "posttrain" and run.model.family.varies_compute and run.loss.routing_weight > 0


def steers_alone(run: RunConfig) -> bool:
    """Whether the routing loss trains the saliency routers alone."""
    return has_routing_loss(run) and run.loss.routing_gradient == "saliency_routers"


def fields_with_gradient(run: RunConfig) -> frozenset[str]:
    """Return the fields of `Routing` through which the losses of a step send gradients into the network."""
    reads = losses.mass_reads(run.loss) if has_routing_loss(run) else frozenset()
    if run.model.router_loss is not None:
        reads |= losses.ROUTER_LOSSES[run.model.router_loss].reads
    if run.model.head_loss is not None:
        reads |= losses.HEAD_LOSSES[run.model.head_loss].reads
    return reads


def routing_loss(mass: Tensor, saliency: Tensor, run: RunConfig) -> Tensor:
    """Return L_routing of a trajectory (0-d, unweighted): its A (B, N), summed over all steps, against M (B, N).

    loss.saliency_map "shuffled": against the M of the next image of the micro-batch.
    """
    if run.loss.saliency_map == "shuffled":
        saliency = saliency.roll(1, 0)
    return losses.trajectory_routing(mass, saliency, run.loss, run.rollout.num_steps * run.model.num_moe_layers)


def routing_weight(run: RunConfig, step: int) -> float:
    """Return the weight of L_routing in optimizer step `step` (0 is the first): it rises from 0 over its warm-up."""
    warmup = run.loss.routing_warmup_steps
    return run.loss.routing_weight * (step / warmup if step < warmup else 1.0)


def mass_gradient(mass: Tensor | None, saliency: Tensor, run: RunConfig, weight: float) -> Tensor | None:
    """Return w = weight * dL_routing / dA (B, N) at the A of all T steps; None without a routing loss."""
    if mass is None:
        return None
    with torch.enable_grad():
        leaf = mass.detach().requires_grad_()
        return torch.autograd.grad(weight * routing_loss(leaf, saliency, run), leaf)[0]
