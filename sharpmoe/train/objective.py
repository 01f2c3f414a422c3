"""What one optimizer step minimises, and the exact forms in which it is computed.

`plain`: the rollout is one forward call and one backward. `two_pass`: a rollout without gradient fixes guidance,
routing and A; then w = dL_routing / dA is known and the steps are trained one by one, each with its own backward
(constant memory). Both give the same gradient, because L_routing reaches the network only through A, a sum over steps
(docs/design/0003-rollout-schedules.md).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.schema import Batch
from sharpmoe import draws, flow, losses
from sharpmoe.config import POOLED, VARYING_COMPUTE, ModelConfig, RunConfig
from sharpmoe.errors import DataError
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import ClassCondition, Condition, TextCondition
from sharpmoe.moe.capacity import threshold_candidate
from sharpmoe.moe.routing import Routing
from sharpmoe.parallel.build import Values
from sharpmoe.rollout import (
    Item,
    Replay,
    StepOutput,
    block_steps,
    detach_records,
    first_guidance,
    replays,
    rollout,
    rollout_step,
)


class LossTerms(NamedTuple):
    """The loss and its parts before weighting, each 0-d, mean over the micro-batch and the rollout."""

    total: Tensor
    flow: Tensor
    routing: Tensor
    balance: Tensor  # the family's own loss on its router: Switch balance, ProMoE's contrast, Expert Race's similarity
    capacity: Tensor  # heads beside the router: DiffMoE's capacity predictor, Expert Race's per-layer predictions


class StepRecord(NamedTuple):
    """What a micro-batch leaves behind, cut from the graph."""

    terms: LossTerms
    routing: tuple[tuple[Routing, ...], ...]  # (T) x (MoE layers)
    thresholds: Tensor | None  # (MoE layers, E) threshold candidates of families that pool tokens, mean over T
    loads: Tensor | None = None  # (MoE layers, E) share of tokens that each expert took, where a bias balances them


class WholeRollout(NamedTuple):
    """Request: all steps and every loss in one forward call; pass 1 of `two_pass` asks for it without gradient."""

    item: Item


class TrainStep(NamedTuple):
    """Request: one step of pass 2."""

    item: Item
    step: int
    replay: Replay
    mass_weight: Tensor | None  # (B, N) dL_routing / dA, weighted; None without routing loss
    num_trained: int  # steps trained in this optimizer step: T, or S of a segment


class ObjectiveOutput(NamedTuple):
    """Answer to a request."""

    loss: Tensor  # 0-d, what backward takes
    terms: LossTerms
    outputs: tuple[StepOutput, ...]  # the steps asked for


Request = WholeRollout | TrainStep
Call = Callable[[Request], ObjectiveOutput]
Backward = Callable[[Tensor, bool], None]  # (loss, is this the last backward of the micro-batch)


class Objective(nn.Module):
    """The module DeepSpeed wraps: a rollout is one call, so parameters are gathered once per optimizer step."""

    def __init__(self, model: DiT, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.run = run

    @property
    def guided(self) -> bool:
        """Whether x0_hat is handed on: post-training of a model with saliency routers."""
        return self.run.stage == "posttrain" and self.model.config.saliency_router

    @staticmethod
    def values(of_model: Values) -> Values:
        """Where the tensors of this module come from, given where those of its model do."""
        return lambda name, shape, experts: of_model(name.removeprefix("model."), shape, experts)

    def forward(self, request: Request) -> ObjectiveOutput:
        """Serve one request of `run_schedule`; pure."""
        if isinstance(request, TrainStep):
            return self._train_step(request)
        outputs = rollout(self.model, request.item, self.guided, self.run.rollout.checkpoint_blocks)
        terms = loss_terms(outputs, request.item.saliency, self.run)
        return ObjectiveOutput(terms.total, terms, tuple(outputs))

    def _train_step(self, request: TrainStep) -> ObjectiveOutput:
        replay = request.replay
        output = rollout_step(self.model, request.item, request.step, replay.guidance, replay.routing_maps)
        terms = loss_terms([output], None, self.run)
        loss = terms.total / request.num_trained
        if request.mass_weight is not None:
            share = len(request.item.times) / request.num_trained
            mass = losses.routing_mass(output.routing, self.run.loss)
            loss = loss + share * (request.mass_weight * mass).sum()
        return ObjectiveOutput(loss, terms, (output,))


def has_routing_loss(run: RunConfig) -> bool:
    """Whether the trajectory routing loss applies: not for token choice, where all tokens get the same compute."""
    return run.stage == "posttrain" and run.model.router in VARYING_COMPUTE and run.loss.routing_weight > 0


def loss_terms(outputs: Sequence[StepOutput], saliency: Tensor | None, run: RunConfig) -> LossTerms:
    """Means over some steps of a trajectory, and L_routing of their A where saliency is given."""
    flow_loss = torch.stack([output.flow for output in outputs]).mean()
    zero = torch.zeros_like(flow_loss)
    balance = _mean_over(outputs, lambda output: router_loss(output.routing, run)) if has_router_loss(run) else zero
    capacity, routing = zero, zero
    if run.model.router == "diffmoe":
        capacity = _mean_over(outputs, lambda output: losses.capacity(output.routing))
    elif run.model.layer_heads:
        capacity = _mean_over(outputs, lambda output: zero if output.layer_flow is None else output.layer_flow)
    if saliency is not None and has_routing_loss(run):
        routing = routing_loss(trajectory_mass(outputs, run), saliency, outputs, run)
    heads_weight = run.loss.layer_weight if run.model.layer_heads else run.loss.capacity_weight
    total = flow_loss + router_weight(run) * balance + heads_weight * capacity
    return LossTerms(total + run.loss.routing_weight * routing, flow_loss, routing, balance, capacity)


def _mean_over(outputs: Sequence[StepOutput], loss: Callable[[StepOutput], Tensor]) -> Tensor:
    return torch.stack([loss(output) for output in outputs]).mean()


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


def trajectory_mass(outputs: Sequence[StepOutput], run: RunConfig) -> Tensor:
    """A of a trajectory, (B, N): the routing mass summed over its steps."""
    return torch.stack([losses.routing_mass(output.routing, run.loss) for output in outputs]).sum(0)


def routing_loss(mass: Tensor, saliency: Tensor, outputs: Sequence[StepOutput], run: RunConfig) -> Tensor:
    """Trajectory routing loss (0-d, unweighted) of the mass (B, N) that `outputs` collected."""
    return losses.trajectory_routing(mass, saliency, run.loss, len(outputs) * len(outputs[0].routing))


def run_schedule(
    call: Call, item: Item, run: RunConfig, backward: Backward, *, guided: bool, block: int = 0
) -> StepRecord:
    """Run one micro-batch through the configured schedule and all its backwards.

    `call` is the engine or the bare `Objective`; `backward(loss, last)` accumulates gradients. `block` is the segment
    trained in this step, the same on every rank. The terms reported are those of the whole trajectory.
    """
    if run.rollout.schedule == "plain":
        loss, terms, outputs = call(WholeRollout(item))
        backward(loss, True)
    elif has_routing_loss(run) or run.rollout.segment_steps is not None:
        terms, outputs = _two_pass(call, item, run, backward, guided, block)
    else:
        terms, outputs = _one_pass(call, item, run, backward, guided)
    detached = LossTerms(*(term.detach() for term in terms))
    return StepRecord(detached, detach_records(outputs), _candidates(outputs, run.model), _loads(outputs, run.model))


def _two_pass(
    call: Call, item: Item, run: RunConfig, backward: Backward, guided: bool, block: int
) -> tuple[LossTerms, tuple[StepOutput, ...]]:
    with torch.no_grad():
        _, terms, outputs = call(WholeRollout(item))
    mass_weight = routing_mass_gradient(outputs, item.saliency, run)
    plan = replays(item, outputs, guided)
    steps = block_steps(len(item.times), run.rollout.segment_steps, block)
    for step in steps:
        loss = call(TrainStep(item, step, plan[step], mass_weight, len(steps))).loss
        backward(loss, step == steps[-1])
    return terms, outputs


def _one_pass(
    call: Call, item: Item, run: RunConfig, backward: Backward, guided: bool
) -> tuple[LossTerms, tuple[StepOutput, ...]]:
    """Without a routing loss nothing is known only at the end: each step is trained as soon as it is run."""
    guidance, outputs, parts = first_guidance(item, guided), [], []
    num_steps = len(item.times)
    for step in range(num_steps):
        loss, terms, (output,) = call(TrainStep(item, step, Replay(guidance, None), None, num_steps))
        backward(loss, step == num_steps - 1)
        guidance = output.x0_hat if guided else None
        outputs.append(StepOutput(output.flow.detach(), output.x0_hat, tuple(r.detach() for r in output.routing)))
        parts.append(LossTerms(*(term.detach() for term in terms)))
    return LossTerms(*(torch.stack(values).mean() for values in zip(*parts, strict=True))), tuple(outputs)


def routing_mass_gradient(outputs: Sequence[StepOutput], saliency: Tensor, run: RunConfig) -> Tensor | None:
    """Return w = routing_weight * dL_routing / dA (B, N) at a whole trajectory's A; None without a routing loss."""
    if not has_routing_loss(run):
        return None
    with torch.no_grad():
        mass = trajectory_mass(outputs, run)
    with torch.enable_grad():
        mass.requires_grad_()
        loss = run.loss.routing_weight * routing_loss(mass, saliency, outputs, run)
        return torch.autograd.grad(loss, mass)[0]


def _candidates(outputs: Sequence[StepOutput], model: ModelConfig) -> Tensor | None:
    """Threshold candidates (MoE layers, E), mean over steps: DiffMoE's k-th probability, Expert Race's k-th score."""
    if model.router not in POOLED or not outputs[0].routing:
        return None
    per_step = [torch.stack([_candidate(record, model) for record in output.routing]) for output in outputs]
    return torch.stack(per_step).mean(0)


def _candidate(record: Routing, model: ModelConfig) -> Tensor:
    if record.capacity_logits is None:
        return record.cutoff.flatten()
    return threshold_candidate(record.capacity_logits, model.capacity)


def _loads(outputs: Sequence[StepOutput], model: ModelConfig) -> Tensor | None:
    """Share of tokens that each expert took (MoE layers, E), mean over the steps."""
    if not model.bias_balancing or not outputs[0].routing:
        return None
    per_step = [torch.stack([r.routing_map.float().mean((0, 1)) for r in output.routing]) for output in outputs]
    return torch.stack(per_step).mean(0)


def make_item(batch: Batch, empty_text: tuple[Tensor, Tensor, Tensor], run: RunConfig) -> Item:
    """Draw noise, times and caption dropout for a batch, each keyed by (seed, position): the same on any rank layout.

    `empty_text`: stored embedding of the empty caption, (L, D_text), (L,), (D_pooled). stage pretrain: one
    logit-normal time; posttrain: T descending times starting at first_time. Tensors land on the batch's device.
    """
    x0 = batch.latent
    x1 = draws.noise(run.seed, batch.position, x0.shape[1:]).to(x0)
    if run.stage == "pretrain":
        times = flow.logit_normal_times(draws.normal_times(run.seed, batch.position))
    else:
        uniform = draws.uniform_times(run.seed, batch.position, run.rollout.num_steps - 1)
        times = flow.descending_times(uniform, run.rollout.first_time)
    dropped = draws.drop_caption(run.seed, batch.position, run.rollout.caption_dropout).to(x0.device)
    return Item(x0, x1, times.to(x0), make_condition(batch, empty_text, run, dropped), batch.saliency)


def make_condition(
    batch: Batch, empty_text: tuple[Tensor, Tensor, Tensor], run: RunConfig, dropped: Tensor
) -> Condition:
    """Condition of a batch with the `dropped` (B,) bool replaced by the empty caption, or by the null class."""
    if run.model.conditioning == "text":
        tokens, mask, pooled = (field.to(batch.latent.device) for field in empty_text)
        return TextCondition(
            torch.where(dropped[:, None, None], tokens.to(batch.text), batch.text),
            torch.where(dropped[:, None], mask, batch.text_mask),
            torch.where(dropped[:, None], pooled.to(batch.pooled), batch.pooled),
        )
    if (batch.label < 0).any():
        key = batch.keys[int((batch.label < 0).nonzero()[0])]
        raise DataError(f"sample {key} has no class label, but model.conditioning is class: use conditioning text")
    null = torch.full_like(batch.label, run.model.num_classes)
    return ClassCondition(torch.where(dropped, null, batch.label) if run.model.class_dropout else batch.label)
