"""The forms in which a micro-batch can be trained, as passes inside the one engine call of an optimizer step.

See docs/design/0003-rollout-schedules.md and sharpmoe/train/schedules.py, which runs them.
"""

from typing import Any, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.train.terms import has_routing_loss


class Pass(NamedTuple):
    """Rollout steps that are run one after the other, and the backward of those that have a graph."""

    steps: int  # with a graph
    before: int = 0  # without one, run first
    recompute: bool = False  # blocks keep their inputs only
    replayed: bool = False  # the steps with a graph were run before: their routing is given
    merged: bool = False  # the steps with a graph are one batch

    @property
    def calls(self) -> int:
        """Calls of the model that leave a graph."""
        return 1 if self.merged else self.steps


class Schedule(NamedTuple):
    """How a micro-batch is trained. The last backward of an optimizer step is the engine's, the others are inside."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def replayed(self) -> int:
        """Rollout steps that are run twice."""
        return sum(part.steps for part in self.passes if part.replayed)


def schedule_of(run: RunConfig) -> Schedule:
    """The form that the run's configuration asks for; one is chosen already where that was auto (see `auto`)."""
    rollout = run.rollout
    assert rollout.schedule != "auto"
    steps = 1 if run.stage == "pretrain" else rollout.num_steps
    if run.stage == "pretrain" or rollout.schedule in ("plain", "checkpoint"):
        return Schedule(_name(run), (Pass(steps, recompute=rollout.schedule == "checkpoint"),))
    trained = rollout.segment_steps if rollout.schedule == "segments" else steps
    if rollout.schedule != "segments" and not has_routing_loss(run) and rollout.merged_steps == 1:
        return Schedule(_name(run), (Pass(1),) * steps)
    return Schedule(_name(run), _two_pass(steps, trained, rollout.steps_kept, rollout.merged_steps))


def schedules_of(run: RunConfig) -> tuple[Schedule, ...]:
    """Every form that the run could take; the run's own is the first."""
    own = schedule_of(run)
    steps = 1 if run.stage == "pretrain" else run.rollout.num_steps
    half = max(1, steps // 2)
    forms: list[dict[str, Any]] = [{"schedule": "plain"}, {"schedule": "checkpoint"}]
    if steps > 1:
        forms += [{"schedule": "two_pass"}, {"schedule": "hybrid", "kept_steps": half}]
        forms += [{"schedule": "segments", "segment_steps": _divisor(steps)}]
    others = [schedule_of(with_schedule(run, **form)) for form in forms]
    return (own, *(schedule for schedule in others if schedule.name != own.name))


def with_schedule(run: RunConfig, **fields: Any) -> RunConfig:
    """The run under another schedule, given as fields of `RolloutConfig`; those that go with its own are dropped."""
    unset = {"kept_steps": None, "segment_steps": 1, "merged_steps": 1}
    return run.model_copy(update={"rollout": run.rollout.model_copy(update=unset | fields)})


def _two_pass(steps: int, trained: int, kept: int, merged: int) -> tuple[Pass, ...]:
    """A first pass with the graphs of the last `kept` steps, then the others of those trained, `merged` at a time.

    Of segments the last one is taken: where a segment lies changes nothing but the order of steps without a graph.
    """
    again = [min(merged, trained - kept - at) for at in range(0, trained - kept, merged)]
    passes = [Pass(size, replayed=True, merged=size > 1) for size in again]
    if kept:
        return (Pass(kept, before=steps - kept), *passes)
    return (passes[0]._replace(before=steps), *passes[1:])


def _name(run: RunConfig) -> str:
    rollout = run.rollout
    if run.stage == "pretrain":
        return "checkpoint" if rollout.schedule == "checkpoint" else "plain"
    segment = rollout.segment_steps if rollout.schedule == "segments" else None
    merged = rollout.merged_steps if rollout.merged_steps > 1 else None
    fields = {"segment_steps": segment, "kept_steps": rollout.kept_steps, "merged_steps": merged}
    return ", ".join([rollout.schedule, *(f"{name} {value}" for name, value in fields.items() if value is not None)])


def _divisor(steps: int) -> int:
    """Segment length that is shown where the run names none: the largest proper divisor of T."""
    return max(size for size in range(1, steps + 1) if steps % size == 0 and (size < steps or steps == 1))
