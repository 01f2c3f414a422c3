"""`rollout.schedule: auto`: the exact schedule with the fewest FLOPs among those that the memory plan says fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.planning.advice import usable
from sharpmoe.planning.coordinator import version_notes
from sharpmoe.planning.estimate import Planner
from sharpmoe.planning.layout import RankLayout
from sharpmoe.train.rollout_schedules import exact_schedules, schedule_of

_GIB = 2**30


class _ScheduleChoice(NamedTuple):
    """The first schedule that fits, or the smallest where none does."""

    run: RunConfig  # with that schedule
    peak: float  # bytes that it takes
    room: float  # bytes that there are
    passed_over: tuple[tuple[RunConfig, float], ...]  # cheaper ones that do not fit, and their bytes

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.peak <= self.room

    def check(self) -> None:
        """Raise ConfigError where none fits."""
        if not self.fits:
            raise ConfigError(
                f"rollout.schedule: auto finds no schedule that fits {self.room / _GIB:.1f} GiB, the smallest takes "
                f"{self.peak / _GIB:.1f}; lower train.micro_batch, or raise parallel.ep_size or the number of ranks"
            )


class ResolvedRun(NamedTuple):
    """A run whose schedule is not auto, and how it was chosen."""

    run: RunConfig
    notes: tuple[str, ...]


def resolve_schedule(run: RunConfig, ds_config: dict[str, Any], world: int, device_memory: float) -> ResolvedRun:
    """Return the run itself or, where its schedule is auto, with the cheapest one that fits devices of so many GiB.

    Never segments, which are an estimate. Pure: the same on every rank. Raises ConfigError where none fits.
    """
    if run.rollout.schedule != "auto":
        return ResolvedRun(run, ())
    planner = Planner(run, read_urls=True)
    layout = planner.layout(world, ds_config)
    choice = _choose(planner, layout, device_memory)
    choice.check()
    return ResolvedRun(choice.run, (_note(choice, device_memory), *_version_notes(layout)))


def resolve_planner(planner: Planner, layout: RankLayout, device_memory: float) -> tuple[Planner, tuple[str, ...]]:
    """Return a planner of the run with a schedule that is not auto, the smallest where none fits, and the notes."""
    if planner.run.rollout.schedule != "auto":
        return planner, ()
    choice = _choose(planner, layout, device_memory)
    return planner.under(choice.run), (_note(choice, device_memory),)


def _cheapest(run: RunConfig, peak: Callable[[RunConfig], float], room: float) -> _ScheduleChoice:
    """Try the exact schedules of a run, the cheapest first, until the `peak` of one is at most `room` bytes."""
    tried: list[tuple[RunConfig, float]] = []
    for candidate in exact_schedules(run):
        taken = peak(candidate)
        if taken <= room:
            return _ScheduleChoice(candidate, taken, room, tuple(tried))
        tried.append((candidate, taken))
    smallest, taken = min(tried, key=lambda pair: pair[1])
    return _ScheduleChoice(smallest, taken, room, tuple(tried))


def _choose(planner: Planner, layout: RankLayout, device_memory: float) -> _ScheduleChoice:
    def peak(run: RunConfig) -> float:
        return planner.estimate(layout, schedule_of(run)).memory.peak

    return _cheapest(planner.run, peak, usable(device_memory))


def _version_notes(layout: RankLayout) -> tuple[str, ...]:
    return version_notes() if layout.zero.stage == 3 else ()


def _note(choice: _ScheduleChoice, device_memory: float) -> str:
    """Say what was chosen, and why not what is cheaper."""
    schedule = schedule_of(choice.run)
    took = f"{schedule.name} ({schedule.cost} forwards' worth per micro-batch)"
    fits = "planned at the peak" if choice.fits else "the least there is, which does not fit"
    why = f"{choice.peak / _GIB:.2f} GiB {fits}, {choice.room / _GIB:.2f} usable of {device_memory:.2f}"
    others = [f"{schedule_of(run).name} {peak / _GIB:.2f}" for run, peak in choice.passed_over]
    ends = " to ".join(dict.fromkeys([*others[:1], *others[-1:]]))  # from the cheapest to the next best
    more = f"; cheaper, and too large: {ends}" if ends and choice.fits else ""
    return f"rollout.schedule: auto took {took}: {why}{more}"
