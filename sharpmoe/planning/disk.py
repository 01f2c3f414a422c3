"""Room on the disk for the checkpoints of a run, from its plan. No communication."""

from __future__ import annotations

from typing import NamedTuple

from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.model.trainable import planned_model
from sharpmoe.planning.estimate import optimizer_bytes
from sharpmoe.train.setup import RunPlan


class CheckpointSpace(NamedTuple):
    """What the checkpoints of a run take."""

    size: int  # bytes of one
    most: int  # there together, one more than are kept while it is written
    more: int  # of them still to come
    free: int | None  # bytes on the disk; None: the system does not say

    @classmethod
    def of(cls, plan: RunPlan) -> CheckpointSpace:
        """Return the space of a run as planned."""
        parameters = planned_model(plan.run).parameters()
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        run, wanted = plan.run, most_checkpoints(plan.run, plan.start.step)
        folders = [*(each.folder for each in plan.found.readable), *(folder for folder, _ in plan.found.damaged)]
        stay = sum(Checkpoints.is_milestone(folder, run.checkpoint) for folder in folders)
        passing = len(folders) - stay if run.checkpoint.resume == "auto" else 0  # they make room for new ones
        return cls(
            size=Checkpoints.size(run.model, optimizer_bytes(run), trained),
            most=max(wanted + stay, len(folders)),
            more=0 if plan.is_finished else max(1, wanted - passing),
            free=Checkpoints.free_bytes(plan.checkpoints),
        )

    def line(self) -> str:
        """Return the space in words."""
        room = "free space is not known" if self.free is None else f"{self.free / 1e9:.3g} GB are free"
        return f"{self.size / 1e9:.3g} GB per checkpoint, at most {self.most} at a time; {room}"


def check_first_checkpoint(plan: RunPlan) -> tuple[str, ...]:
    """Return a note where not all checkpoints to come have room now. Raises CheckpointError where not even one has."""
    space = CheckpointSpace.of(plan)
    Checkpoints.check_room(plan.checkpoints, min(1, space.more), space.size)
    if space.free is None or space.free >= space.more * space.size:
        return ()
    return (f"{plan.checkpoints}: {space.line()}; lower checkpoint.keep, or free space before they are written",)


def most_checkpoints(run: RunConfig, done: int) -> int:
    """Return how many checkpoints are there together at the most: one more than are kept, while it is written."""
    every, steps, config = run.checkpoint.every, run.train.steps, run.checkpoint
    saves = (steps - 1) // every - done // every + 1 if every else 1  # that at the end included
    saves = steps - done if config.minutes else saves  # by the clock: one a step at the most
    milestones = steps // config.keep_every - done // config.keep_every if config.keep_every else 0
    return min(saves, config.keep + config.keep_best + milestones + 1)
