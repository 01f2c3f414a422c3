"""`rollout.schedule: auto` against the memory plan."""

from typing import Any, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.planning.advice import usable
from sharpmoe.planning.choice import GIB, Choice, cheapest, forwards
from sharpmoe.planning.estimate import Planner
from sharpmoe.planning.layout import Layout
from sharpmoe.planning.schedules import schedule_of


class Decided(NamedTuple):
    """A run whose schedule is settled, and how that came about."""

    run: RunConfig
    notes: tuple[str, ...]


def decide(run: RunConfig, ds_config: dict[str, Any], world: int, device_memory: float) -> Decided:
    """The run itself, or where its schedule is auto the cheapest one that fits devices of so many GiB.

    Never segments, which are an estimate. Pure: the same on every rank. Raises ConfigError where none fits.
    """
    if run.rollout.schedule != "auto":
        return Decided(run, ())
    planner = Planner(run)
    choice = choose(planner, planner.layout(world, ds_config), device_memory)
    choice.check()
    return Decided(choice.run, (in_words(choice, device_memory),))


def settle(planner: Planner, layout: Layout, device_memory: float) -> tuple[Planner, tuple[str, ...]]:
    """The same for a plan: a planner of the run that is decided on, the smallest where none fits, and the notes."""
    if planner.run.rollout.schedule != "auto":
        return planner, ()
    choice = choose(planner, layout, device_memory)
    return planner.under(choice.run), (in_words(choice, device_memory),)


def choose(planner: Planner, layout: Layout, device_memory: float) -> Choice:
    """Plan one candidate after the other."""

    def peak(run: RunConfig) -> float:
        return planner.estimate(layout, schedule_of(run)).memory.peak

    return cheapest(planner.run, peak, usable(device_memory))


def in_words(choice: Choice, device_memory: float) -> str:
    """What was chosen, and why not what is cheaper."""
    took = f"{schedule_of(choice.run).name} ({forwards(choice.run)} forwards' worth per micro-batch)"
    fits = "planned at the peak" if choice.fits else "the least there is, which does not fit"
    why = f"{choice.peak / GIB:.2f} GiB {fits}, {choice.room / GIB:.2f} usable of {device_memory:.2f}"
    others = [f"{schedule_of(run).name} {peak / GIB:.2f}" for run, peak in choice.passed_over]
    ends = " to ".join(dict.fromkeys([*others[:1], *others[-1:]]))  # from the cheapest to the next best
    more = f"; cheaper, and too large: {ends}" if ends and choice.fits else ""
    return f"rollout.schedule: auto took {took}: {why}{more}"
