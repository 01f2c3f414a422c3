"""Reader processes that are killed: an error of one line, soon, and nothing left behind."""

import itertools
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import _watched, stream
from sharpmoe.errors import DataError


def readers() -> list[psutil.Process]:
    """This process's children that read data: not the server that test ranks are forked from."""
    return [child for child in psutil.Process().children() if "forkserver" not in " ".join(child.cmdline())]


def until(condition: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_reader_is_one_line_at_the_next_batch(workers: int, shards: Path) -> None:
    train = ShardSet.open(shards, "train")
    before = {child.pid for child in readers()}
    handler = signal.getsignal(signal.SIGCHLD)
    batches = stream(train, seed=0, global_batch=4, micro_batch=4, rank=0, world=1, num_workers=workers)
    for _ in range(3):
        next(batches)
    started = [child for child in readers() if child.pid not in before]
    assert len(started) >= workers
    began = time.monotonic()
    os.kill(started[0].pid, signal.SIGKILL)
    time.sleep(0.3)  # between two batches nothing is raised
    assert signal.getsignal(signal.SIGCHLD) in (handler, signal.SIG_DFL)  # the second where torch has left its own
    with pytest.raises(DataError, match=r"data: reader process \(pid.* is killed by signal: Killed; .*num_w") as error:
        list(itertools.islice(batches, 10))
    assert "\n" not in str(error.value)
    assert until(lambda: not any(child.is_running() and child.status() != "zombie" for child in started), 10)
    assert time.monotonic() - began < 10


def test_closing_ends_the_readers(shards: Path) -> None:
    train = ShardSet.open(shards, "train")
    before = {child.pid for child in readers()}
    batches = stream(train, seed=0, global_batch=4, micro_batch=4, rank=0, world=1, num_workers=2)
    next(batches)
    started = [child for child in readers() if child.pid not in before]
    assert started
    batches.close()
    assert until(lambda: not any(child.is_running() and child.status() != "zombie" for child in started), 10)


def test_other_errors_and_the_end_pass() -> None:
    def broken() -> object:
        yield 1
        raise RuntimeError("something else")

    batches = _watched(broken())  # type: ignore[arg-type]
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match="something else"):
        next(batches)
    assert list(_watched(iter([1, 2]))) == [1, 2]
