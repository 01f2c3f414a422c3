"""Ours and a reference in turn, in one process, so that a busy machine slows both; medians, one line per case.

    case=NAME ours=RATE ref=RATE ratio=X limit=Y n=ROUNDS spread=S

`limit` is the goal: a least ratio or, in a case without a reference, a most number of seconds. `spread` is the
distance between the quartiles of the rounds' ratios (without a reference: times) over their median.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROUNDS = 11

Work = Callable[[], int]  # does something so many times, and says how often
Clock = Callable[[], float]


class Case(NamedTuple):
    """What is measured: items per second of two ways to do the same, or the seconds that one takes."""

    name: str
    ours: Work
    reference: Work | None
    limit: float


class Result(NamedTuple):
    """Medians over all rounds."""

    case: str
    ours: float  # items per second; seconds where there is no reference
    ref: float | None
    ratio: float | None  # median of the rounds' ratios
    limit: float
    n: int
    spread: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ours <= self.limit if self.ratio is None else self.ratio >= self.limit

    def __str__(self) -> str:
        """The line that is printed."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self._asdict().items())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(case: Case, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Result:
    """Run a case once to warm it, then `rounds` times; who begins changes from round to round."""
    if case.reference is None:
        case.ours()
        times = [_seconds(case.ours, clock)[0] for _ in range(rounds)]
        return Result(case.name, statistics.median(times), None, None, case.limit, rounds, _spread(times))
    works = (case.ours, case.reference)
    for work in works:
        work()
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds, count = _seconds(works[which], clock)
            rates[which].append(count / seconds)
    ratios = [ours / reference for ours, reference in zip(*rates, strict=True)]
    ours, reference = (statistics.median(rate) for rate in rates)
    return Result(case.name, ours, reference, statistics.median(ratios), case.limit, rounds, _spread(ratios))


def _seconds(work: Work, clock: Clock) -> tuple[float, int]:
    start = clock()
    count = work()
    return clock() - start, count


def _spread(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle else 0.0


def main(cases: Iterable[Case], description: str, arguments: Sequence[str] | None = None) -> int:
    """Measure and print every case; exit code 1 with --check where a goal is missed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of every case (at least 2)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds: for a machine that is busy")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = []
    for case in cases:
        if options.only in case.name:
            results.append(measure(case, max(2, options.rounds), clock))
            print(results[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    missed = [result.case for result in results if not result.met]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed) and options.check)
