"""The module that DeepSpeed wraps: a whole optimizer step is one call of it.

ZeRO-3 then gathers the parameters once, and one backward reduces the gradients once, whatever the schedule and however
many micro-batches (docs/design/0003-rollout-schedules.md).
"""

from typing import NamedTuple

from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.model.dit import DiT
from sharpmoe.parallel.zero.build import Values
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.local_gradients import LocalGradients
from sharpmoe.train.rollout_schedules import Job, run_schedule
from sharpmoe.train.tally import StepRecord


class StepRequest(NamedTuple):
    """An optimizer step on this rank."""

    items: tuple[TrajectoryBatch, ...]  # micro-batches
    block: int = 0  # which of the T / S segments is trained, the same on every rank; other schedules ignore it
    with_routing: bool = False  # the records tell of the routing


class StepAnswer(NamedTuple):
    """What is left to do, and what was seen."""

    loss: Tensor  # 0-d; its backward yields the gradient of the mean over the micro-batches. Its value has no meaning
    records: tuple[StepRecord, ...]  # one per micro-batch


class Objective(nn.Module):
    """A model and how it is trained."""

    def __init__(self, model: DiT, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.run = run

    @property
    def uses_x0_prev(self) -> bool:
        """Whether x0_hat is handed on: post-training of a model with saliency routers."""
        return self.run.stage == "posttrain" and self.model.config.saliency_router

    @staticmethod
    def values(of_model: Values) -> Values:
        """Where the tensors of this module come from, given where those of its model do."""
        return lambda name, shape, experts: of_model(name.removeprefix("model."), shape, experts)

    def forward(self, request: StepRequest) -> StepAnswer:
        """Run all micro-batches, with every backward but the last one. No parameter and no buffer is written."""
        local, records = LocalGradients(self.model.parameters()), []
        for item in request.items:
            job = Job(self.model, item, self.run, self.uses_x0_prev, request.block, request.with_routing)
            loss, record = run_schedule(job, local.add)
            records.append(record)
            if item is not request.items[-1]:
                local.add(loss)
        return StepAnswer(local.join(loss) / len(records), tuple(records))
