"""The forms in which one optimizer step can be computed, as engine calls (docs/design/0003-rollout-schedules.md)."""

from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.train.objective import has_routing_loss


class EngineCall(NamedTuple):
    """One call of the engine."""

    steps: int  # rollout steps in it
    backward: bool  # with its own backward; a first pass has none
    recompute: bool = False  # blocks keep their inputs only


class Schedule(NamedTuple):
    """The engine calls of one micro-batch, in order."""

    name: str
    calls: tuple[EngineCall, ...]

    @property
    def backwards(self) -> int:
        """Backward calls of one micro-batch."""
        return sum(call.backward for call in self.calls)


def schedules_of(run: RunConfig) -> tuple[Schedule, ...]:
    """Every form that the run could take; the run's own is the first."""
    steps = 1 if run.stage == "pretrain" else run.rollout.num_steps
    own = own_schedule(run)
    segment = run.rollout.segment_steps or _divisor(steps)
    others = [_plain(steps), _checkpointed(steps)]
    if steps > 1:
        others += [_two_pass(run, steps), _segments(steps, segment)]
    return (own, *(schedule for schedule in others if schedule.name != own.name))


def own_schedule(run: RunConfig) -> Schedule:
    """The form that the run's configuration asks for."""
    steps = 1 if run.stage == "pretrain" else run.rollout.num_steps
    if run.rollout.schedule == "two_pass":
        segment = run.rollout.segment_steps
        return _two_pass(run, steps) if segment is None else _segments(steps, segment)
    return _checkpointed(steps) if run.rollout.checkpoint_blocks else _plain(steps)


def _plain(steps: int) -> Schedule:
    return Schedule("plain", (EngineCall(steps, True),))


def _checkpointed(steps: int) -> Schedule:
    return Schedule("plain, checkpoint_blocks", (EngineCall(steps, True, True),))


def _two_pass(run: RunConfig, steps: int) -> Schedule:
    first = (EngineCall(steps, False),) if has_routing_loss(run) else ()
    return Schedule("two_pass", (*first, *(EngineCall(1, True) for _ in range(steps))))


def _segments(steps: int, segment: int) -> Schedule:
    trained = (EngineCall(1, True) for _ in range(segment))
    return Schedule(f"two_pass, segment_steps {segment}", (EngineCall(steps, False), *trained))


def _divisor(steps: int) -> int:
    """Segment length that is shown where the run names none: the largest proper divisor of T."""
    return max(size for size in range(1, steps + 1) if steps % size == 0 and (size < steps or steps == 1))
