"""Run commands as processes, several at a time, until all are done, a limit of time is reached or a signal comes.

A process that is stopped gets SIGTERM and is waited for: a training run saves itself and goes on when it is started
again. Processes end with this one, whatever ends it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.console import clock
from sharpmoe.devices import device_count

_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of a study."""

    name: str
    words: tuple[str, ...]  # of `python -m launcher`
    log: Path  # its output is appended
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()  # names of jobs that come first, where they are in the same call


class JobReport(NamedTuple):
    """What became of jobs."""

    done: tuple[str, ...]
    failed: dict[str, str]  # name -> the last line of its output
    left: tuple[str, ...]  # not started, or stopped
    stopped_by: int | None  # number of the signal that ended it


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    started: float


def run_jobs(jobs: Sequence[Job], parallel: int, seconds: float | None, say: Callable[[str], object]) -> JobReport:
    """Run jobs in their order, at most `parallel` at a time; those that are done already are left out.

    Each is a world of one process with one CPU thread, and needs no port; with several GPUs each job sees one of them.
    After `seconds` no job is started and the running ones are stopped. `say` gets a line per start and end.
    """
    waiting = [job for job in jobs if not job.is_done()]
    done, failed, stopped = [job.name for job in jobs if job not in waiting], dict[str, str](), list[str]()
    running: list[_Running] = []
    began, asked = time.monotonic(), False
    with _signals() as received:
        while waiting or running:
            late = seconds is not None and time.monotonic() - began >= seconds
            if (late or received) and not asked:
                asked = True
                say("stopping: " + (f"{clock(seconds or 0)} are over" if late else f"signal {received[0]}"))
                for each in running:
                    each.process.terminate()
            while not asked and len(running) < parallel and (job := _next(waiting, running, failed)) is not None:
                waiting.remove(job)
                slot = min(set(range(parallel)) - {each.slot for each in running})
                say(f"{job.name}: starts ({len(done)} of {len(jobs)} done)")
                running.append(_Running(job, _start(job, slot), slot, time.monotonic()))
            if asked and not running:
                break
            if not running:  # only jobs whose predecessors failed are left
                break
            time.sleep(_POLL_SECONDS)
            for each in [one for one in running if one.process.poll() is not None]:
                running.remove(each)
                took = clock(time.monotonic() - each.started)
                if each.job.is_done():
                    done.append(each.job.name)
                    say(f"{each.job.name}: done in {took}")
                elif asked:
                    stopped.append(each.job.name)
                else:
                    failed[each.job.name] = _last_line(each.job.log) or f"exit code {each.process.returncode}"
                    say(f"{each.job.name}: failed after {took}: {failed[each.job.name]} ({each.job.log})")
    left = (*stopped, *(job.name for job in waiting))
    return JobReport(tuple(done), failed, left, received[0] if received else None)


def _next(waiting: Sequence[Job], running: Sequence[_Running], failed: Mapping[str, str]) -> Job | None:
    """Return the first job whose predecessors are over and did not fail."""
    open_names = {job.name for job in waiting} | {each.job.name for each in running} | set(failed)
    return next((job for job in waiting if not open_names.intersection(job.after)), None)


def _start(job: Job, slot: int) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    devices = _devices()
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *job.words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them
            preexec_fn=_end_with_parent,
        )


def _devices() -> list[str]:
    """Return the GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    count, given = device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = given.split(",") if given else [str(number) for number in range(count)]
    return names[:count]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the context SIGTERM and SIGINT are only noted, in the list that is yielded."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
