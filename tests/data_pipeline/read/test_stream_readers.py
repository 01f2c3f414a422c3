"""Reader processes that are killed: an error of one line, soon, and nothing left behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import _Steps, _watched, stream
from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError


def readers() -> list[psutil.Process]:
    """This process's children that read data: not the server that test ranks are forked from."""

    def reads(child: psutil.Process) -> bool:
        try:
            return "forkserver" not in " ".join(child.cmdline())
        except psutil.ZombieProcess:  # killed already
            return True

    return [child for child in psutil.Process().children() if reads(child)]


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


@pytest.mark.parametrize("lock", ["data_queue._wlock", "done_event._cond", "index_queue._rlock"])
def test_a_reader_that_is_killed_with_a_lock_leaves_no_other_behind(
    lock: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch would wait for the lock, or twice for a worker that waits for it and ignores the SIGTERM in between."""
    read, held = _Steps.__getitem__, tmp_path / "held"

    def hold(self: _Steps, step: int) -> Any:
        if step == 5:  # read when the second is taken
            frame = sys._getframe()
            while frame.f_code.co_name != "_worker_loop":
                assert frame.f_back is not None
                frame = frame.f_back
            queue, _, name = lock.partition(".")
            getattr(frame.f_locals[queue], name).acquire()
            write_atomically(held, str(os.getpid()).encode())
            signal.pause()
        return read(self, step)

    monkeypatch.setattr(_Steps, "__getitem__", hold)
    train = ShardSet.open(shards, "train")
    before = {child.pid for child in readers()}
    batches = stream(train, seed=0, global_batch=4, micro_batch=4, rank=0, world=1, num_workers=2)
    assert len(list(itertools.islice(batches, 2))) == 2
    started = [child for child in readers() if child.pid not in before]
    assert len(started) == 2
    assert until(held.exists, 100)
    victim = int(held.read_text())
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    with pytest.raises(DataError, match=rf"data: reader process \(pid {victim}\) is killed by signal: Killed; "):
        next(batches)
    assert not any(child.is_running() for child in started)  # ended before the error is raised, and reaped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [
        ("", 0, ""),
        ("raise ValueError('its own error')", 1, "ValueError: its own error"),
        # Python itself has a word about a fork of a process with workers.
        ("if os.fork() == 0:\n    raise SystemExit\nos.wait()\nnext(batches)\nnext(batches)", 0, "child process"),
    ],
    ids=["end", "error", "fork"],
)
def test_a_script_that_leaves_a_stream_open_ends(ending: str, code: int, error: str, shards: Path) -> None:
    script = f"""
import os
from pathlib import Path
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream

train = ShardSet.open(Path({str(shards)!r}), "train")
batches = stream(train, seed=0, global_batch=4, micro_batch=4, rank=0, world=1, num_workers=2)
next(batches)
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == code
    assert error in ended.stderr
    assert bool(error) == bool(ended.stderr)


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
