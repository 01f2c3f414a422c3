"""The module that DeepSpeed wraps: a whole optimizer step is one call of it.

ZeRO-3 then gathers the parameters once, and one backward reduces the gradients once, whatever the schedule and however
many micro-batches (docs/design/0003-rollout-schedules.md). What is called with and without a graph is read from
`rollout_schedules`; here it is executed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.moe.routing import CallMode
from sharpmoe.parallel.zero.build import Values
from sharpmoe.rollout import Replay, StepOutput, TrajectoryBatch, first_x0_prev, replay, replay_steps, rollout_step
from sharpmoe.train.local_gradients import LocalGradients
from sharpmoe.train.rollout_schedules import ModelCall, Pass, schedule_of
from sharpmoe.train.tally import StepRecord, Tally
from sharpmoe.train.terms import StepTerms, mass_gradient, routing_loss, step_mass, step_terms


class StepRequest(NamedTuple):
    """An optimizer step on this rank."""

    items: tuple[TrajectoryBatch, ...]  # micro-batches
    segment: int = 0  # which of the T / S segments is trained, the same on every rank; other schedules ignore it
    with_routing: bool = False  # the records hold sums of the routing


class StepAnswer(NamedTuple):
    """The backward that is left of an optimizer step, and its figures."""

    loss: Tensor  # 0-d; its backward yields the gradient of the mean over the micro-batches. Its value has no meaning
    records: tuple[StepRecord, ...]  # one per micro-batch


class Objective(nn.Module):
    """A model and how it is trained."""

    def __init__(self, model: Backbone, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.run = run

    @property
    def uses_x0_prev(self) -> bool:
        """Whether x0_hat is passed on: post-training of a model with saliency routers."""
        return self.run.stage == "posttrain" and self.model.config.saliency_router

    @staticmethod
    def values(of_model: Values) -> Values:
        """Return the source of this module's tensors, given that of its model's."""
        return lambda name, shape, experts: of_model(name.removeprefix("model."), shape, experts)

    def forward(self, request: StepRequest) -> StepAnswer:
        """Run all micro-batches, with every backward but the last one. No parameter and no buffer is written."""
        local = LocalGradients(self.model.parameters())
        loss: Tensor | None = None  # of the last pass
        records = []
        for item in request.items:
            schedule = schedule_of(self.run, len(item.times), request.segment)
            trajectory = _Trajectory(self, item, request.with_routing, schedule.trained)
            for each in schedule.passes:
                if loss is not None:
                    local.add(loss)
                loss = trajectory.run(each)
            records.append(trajectory.record())
        assert loss is not None, "an optimizer step has at least one micro-batch"
        return StepAnswer(local.join(loss) / len(records), tuple(records))


class _Trajectory:
    """The rollout of one micro-batch, from pass to pass."""

    def __init__(self, objective: Objective, item: TrajectoryBatch, with_routing: bool, num_trained: int) -> None:
        """num_trained: rollout steps with a backward, T or S of a segment."""
        self._model, self._run, self._item = objective.model, objective.run, item
        self._uses_x0_prev = objective.uses_x0_prev
        self._num_steps, self._num_trained = len(item.times), num_trained
        self._tally = Tally(objective.run, with_routing)
        self._x0_prev = first_x0_prev(item, self._uses_x0_prev)
        self._replays: dict[int, Replay] = {}  # by rollout step
        self._mass_weight: Tensor | None = None  # (B, N) w

    def run(self, part: Pass) -> Tensor:
        """Make the calls of a pass and return the loss of its backward, 0-d; nothing here holds its graph."""
        terms: list[StepTerms] = []
        for call in part.calls:
            terms += self._replay(call) if call.replayed else self._step(call)
        total = torch.stack([each.total for each in terms]).sum() / self._num_trained
        masses = [each.mass for each in terms if each.mass is not None]
        if not masses:
            return total
        mass = torch.stack(masses).sum(0)
        if part.whole:
            return total + self._run.loss.routing_weight * routing_loss(mass, self._item.saliency, self._run)
        if self._mass_weight is None:  # A is known: all steps are run before the first backward
            self._mass_weight = mass_gradient(self._tally.mass, self._item.saliency, self._run)
        assert self._mass_weight is not None
        return total + self._num_steps / self._num_trained * (self._mass_weight * mass).sum()

    def record(self) -> StepRecord:
        """Return the figures of the trajectory, when all passes are done."""
        return self._tally.record(self._item.saliency)

    def _step(self, call: ModelCall) -> Sequence[StepTerms]:
        """Run one rollout step; returns its losses where they have a graph."""
        (step,) = call.steps
        with torch.set_grad_enabled(call.graph):
            mode = CallMode(recompute=call.recompute, for_losses=not call.rerun)
            output = rollout_step(self._model, self._item, step, self._x0_prev, mode)
            if call.rerun:
                self._tally.add_mass(step_mass(output.routing, self._run))
                self._replays[step] = replay(output, self._x0_prev)
                terms = []
            else:
                terms = self._losses([output])
                self._tally.add_mass(terms[0].mass)
        self._x0_prev = output.x0_hat if self._uses_x0_prev else None
        return terms if call.graph else []

    def _replay(self, call: ModelCall) -> Sequence[StepTerms]:
        """Run steps again, in one batch, as the first pass had them."""
        replays = [self._replays[step] for step in call.steps]
        return self._losses(replay_steps(self._model, self._item, call.steps, replays))

    def _losses(self, outputs: Sequence[StepOutput]) -> list[StepTerms]:
        terms = [step_terms(output, self._run) for output in outputs]
        for output, each in zip(outputs, terms, strict=True):
            self._tally.add(output, each)
        return terms
