"""The module that DeepSpeed wraps: a whole optimizer step is one call of it.

ZeRO-3 then gathers the parameters once, and one backward reduces the gradients once, whatever the schedule and however
many micro-batches (docs/design/0003-rollout-schedules.md). `rollout_schedules` describes which calls are made with and
without a graph; this module executes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.trainable import what_is_trained
from sharpmoe.moe.routing import CallMode
from sharpmoe.rollout import (
    Replay,
    StepOutput,
    TrajectoryBatch,
    first_x0_prev,
    replay,
    replay_steps,
    rollout_step,
    with_own_state,
)
from sharpmoe.train.local_gradients import LocalGradients
from sharpmoe.train.rollout_schedules import ModelCall, Pass, schedule_of
from sharpmoe.train.tally import StepRecord, Tally
from sharpmoe.train.terms import StepTerms, mass_gradient, routing_loss, steers_alone, step_mass, step_terms

if TYPE_CHECKING:  # its module imports DeepSpeed; a loop of the user's own computes the same loss without it
    from sharpmoe.parallel.zero.build import Values


class StepRequest(NamedTuple):
    """An optimizer step on this rank."""

    items: tuple[TrajectoryBatch, ...]  # micro-batches
    segment: int = 0  # which of the T / S segments is trained, the same on every rank; other schedules ignore it
    with_routing: bool = False  # the records hold sums of the routing
    routing_weight: float | None = None  # weight of L_routing in this step; None: loss.routing_weight
    # (MoE layers, E) float32 scores that experts accept, where the steps of a trajectory are one pool. None, as in the
    # first step of a run: the tokens of a call compete for the places of each expert.
    cutoffs: Tensor | None = None


class StepAnswer(NamedTuple):
    """The last loss of an optimizer step, whose backward the engine takes, and the figures of the step."""

    loss: Tensor  # 0-d; its backward completes the gradient of the mean over micro-batches; its value has no meaning
    records: tuple[StepRecord, ...]  # one per micro-batch


class Objective(nn.Module):
    """A model and the configuration by which it is trained."""

    def __init__(self, model: Backbone, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.run = run

    @property
    def uses_x0_prev(self) -> bool:
        """Whether a step gets the x0_hat of the one before: in post-training of a model with saliency routers."""
        return self.run.stage == "posttrain" and self.model.config.saliency_router

    @staticmethod
    def values(of_model: Values) -> Values:
        """Return the source of this module's tensors, given that of the model's tensors."""
        return lambda name, shape, experts: of_model(name.removeprefix("model."), shape, experts)

    def forward(self, request: StepRequest) -> StepAnswer:
        """Run all micro-batches, and every backward except the last. No parameter and no buffer is written."""
        local = LocalGradients(self.model.parameters())
        loss: Tensor | None = None  # of the last pass
        records = []
        for item in request.items:
            schedule = schedule_of(self.run, len(item.times), request.segment)
            trajectory = _Trajectory(self, item, request, schedule.num_trained)
            for each in schedule.passes:
                if loss is not None:
                    local.add(loss)
                loss = trajectory.run(each)
                self._check_trains(loss)
            records.append(trajectory.record())
        assert loss is not None, "an optimizer step has at least one micro-batch"
        return StepAnswer(local.join(loss) / len(records), tuple(records))

    def _check_trains(self, loss: Tensor) -> None:
        """Raise ConfigError where a loss depends on frozen parameters only; all ranks are alike."""
        what = what_is_trained(self.run)
        if what and torch.is_grad_enabled() and not loss.requires_grad:
            raise ConfigError(
                f"{what}: no loss of stage {self.run.stage} depends on these parameters, so nothing would be "
                "trained; train others too, or set the weight of a loss on them (loss.*)"
            )


class _Trajectory:
    """The rollout of one micro-batch, and what its passes hand on to each other."""

    def __init__(self, objective: Objective, item: TrajectoryBatch, request: StepRequest, num_trained: int) -> None:
        """num_trained: rollout steps with a backward: T, or the S steps of a segment."""
        self._model, self._run, self._item = objective.model, objective.run, item
        self._uses_x0_prev = objective.uses_x0_prev
        cutoffs = None if request.cutoffs is None else tuple(request.cutoffs)
        self._mode = CallMode(steering=steers_alone(objective.run), cutoffs=cutoffs)
        self._num_steps, self._num_trained = len(item.times), num_trained
        given = request.routing_weight
        self._routing_weight = self._run.loss.routing_weight if given is None else given
        self._tally = Tally(
            objective.run, request.with_routing, item.saliency, self._routing_weight, by_cutoff=cutoffs is not None
        )
        self._x0_prev = first_x0_prev(item, self._uses_x0_prev)
        self._replays: dict[int, Replay] = {}  # by rollout step
        self._mass_weight: Tensor | None = None  # (B, N) w

    def run(self, part: Pass) -> Tensor:
        """Make the calls of a pass and return the loss of its backward, 0-d. This object does not hold its graph."""
        terms: list[StepTerms] = []
        for call in part.calls:
            terms += self._replay(call) if call.second_of_two else self._step(call)
        total = torch.stack([each.total for each in terms]).sum() / self._num_trained
        masses = [each.mass for each in terms if each.mass is not None]
        if not masses:
            return total
        mass = torch.stack(masses).sum(0)
        if part.has_all_steps:
            return total + self._routing_weight * routing_loss(mass, self._item.saliency, self._run)
        if self._mass_weight is None:  # A is complete: the first pass ran all steps
            self._mass_weight = mass_gradient(self._tally.mass, self._item.saliency, self._run, self._routing_weight)
        assert self._mass_weight is not None
        return total + self._num_steps / self._num_trained * (self._mass_weight * mass).sum()

    def record(self) -> StepRecord:
        """Return the figures of the trajectory. Call it after the last pass."""
        return self._tally.record()

    def _step(self, call: ModelCall) -> Sequence[StepTerms]:
        """Run one rollout step; return its losses if they have a graph, else nothing."""
        (step,) = call.steps
        with torch.set_grad_enabled(call.graph and torch.is_grad_enabled()):
            mode = self._mode._replace(recompute=call.recompute, for_losses=not call.first_of_two)
            output = rollout_step(self._model, self._item, step, self._x0_prev, mode)
            if call.first_of_two:
                self._tally.add_choice(output.routing, step_mass(output.routing, self._run))
                self._replays[step] = replay(output, self._x0_prev)
                terms = []
            else:
                terms = self._losses([output])
                self._tally.add_choice(output.routing, terms[0].mass)
        self._x0_prev = output.x0_hat if self._uses_x0_prev else None
        if step + 1 < self._num_steps and (step + 1) % (self._run.rollout.own_steps + 1):
            self._item = with_own_state(self._item, step, output.x0_hat)  # later passes read it too
        return terms if call.graph else []

    def _replay(self, call: ModelCall) -> Sequence[StepTerms]:
        """Run steps a second time, as one batch, with the routing and x0_prev of their first run."""
        replays = [self._replays[step] for step in call.steps]
        return self._losses(replay_steps(self._model, self._item, call.steps, replays, self._mode))

    def _losses(self, outputs: Sequence[StepOutput]) -> list[StepTerms]:
        terms = [step_terms(output, self._run) for output in outputs]
        for output, each in zip(outputs, terms, strict=True):
            self._tally.add(output, each)
        return terms
