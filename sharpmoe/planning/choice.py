"""`rollout.schedule: auto`: the exact schedule with the fewest FLOPs among those that fit a memory plan."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.train.flops import passes
from sharpmoe.train.terms import has_routing_loss

GIB = 2**30


class Choice(NamedTuple):
    """The first schedule that fits, or the smallest where none does."""

    run: RunConfig  # with that schedule
    peak: float  # bytes that it takes
    room: float  # bytes that there are
    passed_over: tuple[tuple[RunConfig, float], ...]  # cheaper ones that do not fit, and their bytes

    @property
    def fits(self) -> bool:
        """Whether there is one that does."""
        return self.peak <= self.room

    def check(self) -> None:
        """Raise a ConfigError where none fits."""
        if not self.fits:
            raise ConfigError(
                f"rollout.schedule: auto finds no schedule that fits {self.room / GIB:.1f} GiB, the smallest takes "
                f"{self.peak / GIB:.1f}; lower train.micro_batch, or raise parallel.ep_size or the number of ranks"
            )


def candidates(run: RunConfig) -> list[RunConfig]:
    """The run under every exact schedule worth trying, the cheapest first; where two cost the same, plain wins.

    `hybrid` of one step keeps what `two_pass` keeps and saves a forward, so that `two_pass` is for runs without a
    routing loss, where it costs what `plain` costs.
    """
    schedules: list[dict[str, Any]] = [{"schedule": "plain"}]
    if run.stage == "posttrain" and has_routing_loss(run):
        schedules += [{"schedule": "hybrid", "kept_steps": kept} for kept in range(1, run.rollout.num_steps)]
    elif run.stage == "posttrain":
        schedules.append({"schedule": "two_pass"})
    schedules.append({"schedule": "checkpoint"})
    runs = [run.model_copy(update={"rollout": run.rollout.model_copy(update=fields)}) for fields in schedules]
    return sorted(runs, key=forwards)


def forwards(run: RunConfig) -> int:
    """Cost of a micro-batch in forwards of the model; a backward counts as two."""
    count = passes(run)
    return count.forwards + count.trained * (3 if count.recomputed else 2)


def cheapest(run: RunConfig, peak: Callable[[RunConfig], float], room: float) -> Choice:
    """Try the candidates of a run until the `peak` of one is at most `room` bytes."""
    tried: list[tuple[RunConfig, float]] = []
    for candidate in candidates(run):
        taken = peak(candidate)
        if taken <= room:
            return Choice(candidate, taken, room, tuple(tried))
        tried.append((candidate, taken))
    smallest, taken = min(tried, key=lambda pair: pair[1])
    return Choice(smallest, taken, room, tuple(tried))
