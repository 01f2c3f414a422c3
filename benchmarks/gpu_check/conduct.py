"""Conduct the check of a device: parts as processes of their own, each with a limit of time, and the table at the end.

In the folder of the check: `facts/` with one file of JSON lines per process, written as the process goes,
`log/` with what each printed, `steps.jsonl` with what became of each, and `table.md`, written again after every step.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu_check.facts import Facts
from benchmarks.gpu_check.table import became, write_table
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.devices import ACCELERATOR
from sharpmoe.durable import fresh_folder
from sharpmoe.errors import ConfigError

_CPU_FACTOR = 4.0  # limits of a dry run: it shares its machine with other work, and a host is slow
_LEAST_SECONDS = 10.0  # a step is not started with less
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_BENCHMARKS = ("ceilings", "moe_layer", "block", "rollout", "utilisation", "sampling", "train_step", "optimizer")
_TESTS = ("tests/moe", "tests/parallel/experts/test_dispatch.py")  # files outside tests/gpu with tests marked gpu
_CHILD_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be checked."""

    out: Path
    device: str  # cpu (the smallest sizes) or cuda
    parts: tuple[str, ...]
    seconds: float  # limit of all parts together

    @property
    def command(self) -> str:
        """The command that asks for this, for the table."""
        some = () if self.parts == tuple(PARTS) else ("--parts", *self.parts)
        return shlex.join(["sharpmoe", "gpu-check", "--device", self.device, *some])


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of a part."""

    part: str
    name: str
    words: tuple[str, ...]  # of python
    seconds: float  # limit


def _own(part: str, module: str, asked: Asked, seconds: float, *words: str, name: str = "") -> Step:
    """A step that is a module of this package; it gets the device and the file of its facts."""
    name = name or part
    given = ("--device", asked.device, "--facts", str(asked.out / "facts" / f"{name}.jsonl"), *words)
    return Step(part=part, name=name, words=("-m", f"benchmarks.gpu_check.{module}", *given), seconds=seconds)


def _environment(asked: Asked) -> list[Step]:
    return [_own("environment", "environment", asked, 60)]


def _tests(asked: Asked) -> list[Step]:
    """One process per file: an error of CUDA spoils the process in which it happens."""
    files = [str(path.relative_to(PROJECT_ROOT)) for path in sorted((PROJECT_ROOT / "tests/gpu").glob("test_*.py"))]
    rows = [*files, *_TESTS] if asked.device == "cuda" else ["tests/gpu"]  # without a device they are only collected
    options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs")
    return [
        Step(
            part="tests",
            name=f"tests_{Path(row).stem.removeprefix('test_')}",
            words=("-m", "pytest", *options, f"--junitxml={asked.out / 'facts' / f'{Path(row).stem}.xml'}", row),
            seconds=90,
        )
        for row in rows
    ]


def _train(asked: Asked) -> list[Step]:
    return [_own("train", "training", asked, 150, "--folder", str(asked.out / "runs"))]


def _profile(asked: Asked) -> list[Step]:
    return [_own("profile", "step_profile", asked, 100)]


def _compiled(asked: Asked) -> list[Step]:
    return [
        _own("compiled", "compiled_blocks", asked, 80, "--work", work, name=f"compiled_{work}")
        for work in ("training", "sampling")
    ]


def _benchmarks(asked: Asked) -> list[Step]:
    precision = ("--dtype", "bf16", "--rounds", "7") if asked.device == "cuda" else ("--tiny", "--rounds", "2")
    return [
        Step(
            part="benchmarks",
            name=f"benchmark_{name}",
            words=(
                *("-m", f"benchmarks.{name}", "--device", asked.device, *precision),
                *("--json", str(asked.out / "facts" / f"benchmark_{name}.json")),
            ),
            seconds=60,
        )
        for name in _BENCHMARKS
    ]


PARTS: dict[str, Callable[[Asked], list[Step]]] = {
    "environment": _environment,
    "tests": _tests,
    "train": _train,
    "profile": _profile,
    "compiled": _compiled,
    "benchmarks": _benchmarks,
}


def conduct(asked: Asked, say: Callable[[str], object]) -> int:
    """Run all steps of the asked parts in turn; return 0 where each ended with 0.

    A step that fails, or is stopped at its limit, does not stop the next. After SIGTERM or Ctrl-C the running step is
    ended and the table holds what there is. Raises ConfigError where the folder holds files or this is no checkout.
    """
    _check(asked)
    for folder in ("facts", "log"):
        fresh_folder(asked.out / folder)
    steps = [step for part in PARTS if part in asked.parts for step in PARTS[part](asked)]
    record, began = Facts(asked.out / "steps.jsonl", quiet=True), time.monotonic()
    codes: list[int | str | None] = []
    factor = _CPU_FACTOR if asked.device == "cpu" else 1.0
    try:
        for step in steps:
            left = asked.seconds - (time.monotonic() - began)
            code, seconds = (
                run_step(step, min(step.seconds * factor, left), asked) if left >= _LEAST_SECONDS else (None, 0.0)
            )
            say(f"{step.name}: {became(code)} after {seconds:.0f} s")
            codes.append(code)
            record.tell(part=step.part, step=step.name, code=code, seconds=round(seconds, 1), command=_spoken(step))
            write_table(asked.out, asked.device, asked.command, datetime.now(UTC).date().isoformat())
    finally:
        say(f"table: {asked.out / 'table.md'} (log of every step: {asked.out / 'log'})")
    return int(any(code != 0 for code in codes))


def _check(asked: Asked) -> None:
    if not (PROJECT_ROOT / "tests" / "gpu").is_dir():
        raise ConfigError(f"gpu-check needs the tests and configs of a checkout; {PROJECT_ROOT} has none: clone it")
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        raise ConfigError(f"--out is {asked.out}, which exists and is not an empty folder; name another or remove it")


def run_step(step: Step, seconds: float, asked: Asked) -> tuple[int | str, float]:
    """Run a step; return its exit code, or "limit" where it was ended after `seconds`, and how long it took."""
    log = asked.out / "log" / f"{step.name}.txt"
    began = time.monotonic()
    with log.open("wb") as output, _terminated_as_interrupted():
        process = subprocess.Popen(
            [sys.executable, *step.words],
            cwd=PROJECT_ROOT,
            env=_variables(asked.device),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own children end with it
        )
        code: int | str
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = "limit"
        finally:
            _end(process)
    return code, time.monotonic() - began


def _variables(device: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in _CHILD_LAUNCHER_VARIABLES}
    paths = [str(PROJECT_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | {ACCELERATOR: device}  # tests marked gpu run only where it says cuda


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within the context SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _spoken(step: Step) -> str:
    """The command of a step as a user would type it."""
    return shlex.join(["python", *step.words])
