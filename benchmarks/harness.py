"""Time ours, a reference and a limit in turn, in one process, so that a busy machine slows all of them equally.

    case=NAME ours=T ref=T ratio=X limit=T of_limit=Y goal=G n=ROUNDS spread=S [FACT=VALUE ...]

Times are medians per item, in ms. `ratio` is the reference's time over ours; `limit` is the time of a lower bound of
ours (a dense layer of equal FLOPs, the machine's GEMM or copy rate), `of_limit` that time over ours: more is better in
both. `spread` is the distance between the quartiles of the rounds' ratios (without a reference: of_limit; without both:
times) over their median. Facts are counted, not timed, except rates (FLOP/s, bytes/s), whose amount is counted; on
CUDA `peak_gib` is the most memory that the case had allocated. Before a case is timed, its `check` compares the
outcomes.

A case is built when it is its turn, and its memory is free before the next. One that does not fit the device, or whose
outcomes differ, is a line with `error=` in place of the times, and the others go on. --json is written after each case.

On the CPU the process keeps freed memory, as CUDA's allocator does: otherwise every call would get large tensors from
the system anew, and the version that allocates more would pay for clearing their pages.
"""

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from sharpmoe.durable import write_atomically

ROUNDS = 11
_GIB = 2**30

Work = Callable[[], int]  # runs something several times and returns how often
Clock = Callable[[], float]  # seconds


class Goals(NamedTuple):
    """Goals of a case; a figure whose goal is None is only reported."""

    ratio: float | None = None  # at least
    of_limit: float | None = None  # at least
    ms: float | None = None  # at most

    def __str__(self) -> str:
        words = {"ratio>=": self.ratio, "of_limit>=": self.of_limit, "ms<=": self.ms}
        return ",".join(f"{word}{value:g}" for word, value in words.items() if value is not None) or "-"


class Case(NamedTuple):
    """Several ways to compute the same."""

    name: str
    ours: Work
    reference: Work | None = None
    limit: Work | None = None
    goals: Goals = Goals()
    check: Callable[[], None] | None = None  # raises AssertionError where outcomes differ
    facts: Mapping[str, float] = {}
    rates: Mapping[str, float] = {}  # amounts per item of ours, printed per second


class Planned(NamedTuple):
    """A case that is built, with its models, only when it is measured."""

    name: str
    build: Callable[[], Case]


class Options(NamedTuple):
    """Device and precision."""

    device: torch.device
    dtype: torch.dtype
    precision: str  # fp32 or bf16
    tiny: bool = False  # the smallest sizes, which show that every case runs, and no goals

    @property
    def memory(self) -> float:
        """GiB of the device; without limit on the CPU."""
        if self.device.type != "cuda":
            return float("inf")
        return float(torch.cuda.get_device_properties(self.device).total_memory) / _GIB


Sizes = TypeVar("Sizes")
SizeTable = Mapping[str, Mapping[float, Sizes]]  # tiny, cpu or cuda -> GiB that the device has at least -> sizes


def sizes_for(table: SizeTable[Sizes], options: Options) -> Sizes:
    """Return the sizes of the largest memory that the device has."""
    by_memory = table["tiny" if options.tiny else options.device.type]
    return by_memory[max(least for least in by_memory if least <= max(options.memory, min(by_memory)))]


class Result(NamedTuple):
    """Medians over all rounds; ms per item."""

    case: str
    ours: float
    ref: float | None
    ratio: float | None
    limit: float | None
    of_limit: float | None
    goals: Goals
    n: int
    spread: float
    facts: Mapping[str, float]

    @property
    def met(self) -> bool:
        """Whether the goals are reached."""
        pairs = ((self.ratio, self.goals.ratio), (self.of_limit, self.goals.of_limit))
        in_time = self.goals.ms is None or self.ours <= self.goals.ms
        return in_time and all(goal is None or (value is not None and value >= goal) for value, goal in pairs)

    def __str__(self) -> str:
        """Return the line that is printed."""
        times = {name: _time(getattr(self, name)) for name in ("ours", "ref", "limit")}
        shares = {name: _number(getattr(self, name)) for name in ("ratio", "of_limit", "spread")}
        words = {"case": self.case} | times | shares | {"goal": str(self.goals), "n": str(self.n)}
        order = ("case", "ours", "ref", "ratio", "limit", "of_limit", "goal", "n", "spread")
        facts = [f"{name}={_number(value)}" for name, value in self.facts.items()]
        return " ".join([*(f"{name}={words[name]}" for name in order), *facts])


class Failure(NamedTuple):
    """A case without times."""

    case: str
    error: str
    memory: bool  # the device has too little; otherwise outcomes differ or something does not run
    met: bool = False

    def __str__(self) -> str:
        """Return the line that is printed."""
        return f"case={self.case} error={self.error}"


def attempt(
    planned: Planned, options: Options, rounds: int = ROUNDS, clock: Clock = time.perf_counter
) -> Result | Failure:
    """Build and measure a case; return what became of it, with all its memory free."""
    on_cuda = options.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    try:
        case = planned.build()
        assert case.name == planned.name, (case.name, planned.name)
        result = measure(case._replace(goals=Goals()) if options.tiny else case, rounds, clock)
        if on_cuda:
            peak = torch.cuda.max_memory_allocated(options.device) / _GIB
            result = result._replace(facts={**result.facts, "peak_gib": peak})
        return result
    except (AssertionError, RuntimeError) as error:
        # torch says it in a class on CUDA, in words on the CPU.
        memory = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        text = " ".join(str(error).split()) or type(error).__name__
        return Failure(planned.name, f"out of memory: {text}" if memory else text, memory)
    finally:
        case = None  # type: ignore[assignment]
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()


def _time(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.4g}ms"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def measure(case: Case, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Result:
    """Check a case, run it once to warm up, then `rounds` times; the order changes from round to round."""
    if case.check is not None:
        case.check()
    works = {"ours": case.ours, "ref": case.reference, "limit": case.limit}
    present = {name: work for name, work in works.items() if work is not None}
    for work in present.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in present}
    for number in range(rounds):
        names = list(present)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds_per_item(present[name], clock))
    middle = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratios, shares = (_quotients(times, name) for name in ("ref", "limit"))
    spread = _spread(ratios or shares or times["ours"])
    return Result(
        case.name,
        middle["ours"],
        middle.get("ref"),
        statistics.median(ratios) if ratios else None,
        middle.get("limit"),
        statistics.median(shares) if shares else None,
        case.goals,
        rounds,
        spread,
        dict(case.facts) | {f"{unit}/s": 1e3 * amount / middle["ours"] for unit, amount in case.rates.items()},
    )


def _seconds_per_item(work: Work, clock: Clock) -> float:
    start = clock()
    count = work()
    return (clock() - start) / count


def _quotients(times: Mapping[str, Sequence[float]], name: str) -> list[float]:
    if name not in times:
        return []
    return [other / ours for other, ours in zip(times[name], times["ours"], strict=True)]


def _spread(values: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle else 0.0


def synchronised(clock: Clock, device: torch.device) -> Clock:
    """Return a clock that waits for all work of a GPU before it is read."""

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


def main(
    build: Callable[[Options], Iterable[Planned]], description: str, arguments: Sequence[str] | None = None
) -> int:
    """Measure and print every case that `build` yields.

    Exit code 1 where outcomes differ, and with --check where a goal is missed or a case does not fit the device.
    """
    given = _parser(description).parse_args(arguments)
    dtype = torch.bfloat16 if given.dtype == "bf16" else torch.float32
    options = Options(torch.device(given.device), dtype, given.dtype, given.tiny)
    torch.set_num_threads(given.threads)
    _keep_memory()
    on_cpu = options.device.type == "cpu"
    clock = time.process_time if on_cpu and not given.wall else time.perf_counter
    timer = clock if on_cpu else synchronised(clock, options.device)
    results: list[Result | Failure] = []
    for planned in build(options):
        if given.only not in planned.name:
            continue
        results.append(attempt(planned, options, max(2, given.rounds), timer))
        print(results[-1], flush=True)
        if given.json:
            write_atomically(given.json, json.dumps([_plain(result) for result in results], indent=1) + "\n")
    missed = [result.case for result in results if not result.met]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    failed = [result for result in results if isinstance(result, Failure) and not result.memory]
    return int(bool(failed) or (bool(missed) and given.check))


def _keep_memory() -> None:
    """Make glibc, where it is used, keep freed memory in this process."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(-4, 0)  # M_MMAP_MAX: no separate mappings
        adjust(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink, however large it is


def _plain(result: Result | Failure) -> dict[str, object]:
    if isinstance(result, Failure):
        return {"case": result.case, "error": result.error, "out_of_memory": result.memory}
    return result._asdict() | {"goals": result.goals._asdict(), "facts": dict(result.facts), "met": result.met}


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE, after every case")
    add("--tiny", action="store_true", help="the smallest sizes, without goals: that every case runs")
    add("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    add("--rounds", type=int, default=ROUNDS, help="rounds of every case (at least 2)")
    add("--threads", type=int, default=1, help="threads of torch on the CPU")
    add("--wall", action="store_true", help="on the CPU: measure wall time, not processor time")
    add("--check", action="store_true", help="exit with 1 if a goal is missed")
    return parser
