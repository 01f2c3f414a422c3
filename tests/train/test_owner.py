"""One live run per run folder: a second is refused by name, and the dead do not block."""

import errno
import fcntl
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharpmoe.errors import CheckpointError, OutsideError
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop, owner
from sharpmoe.train.owner import run_folder_owned
from tests.distributed import run_ranks, start_ranks
from tests.train.setting import ALONE, make_run, plan_for


def own_for_long(world: World, folder: Path) -> None:
    with run_folder_owned(folder, world):
        (folder / "owned").touch()
        if not os.fork():  # as a worker of the DataLoader, which outlives a killed parent for seconds
            time.sleep(5)
            os._exit(0)
        time.sleep(60)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.dist
def test_a_second_live_process_is_refused_by_name_and_a_killed_one_does_not_block(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(shards, tmp_path)
    folder = tmp_path / "run"
    with start_ranks(own_for_long, 1, folder) as (process,):
        wait_for(folder / "owned")
        with pytest.raises(CheckpointError) as caught:
            loop.train(plan_for(run, ALONE), ALONE)
        host = socket.gethostname()
        assert str(caught.value) == (
            f"{folder}: process {process.pid} on {host} is running in this folder; wait until it ends, or give the run "
            "a --name of its own"
        )
        assert sorted(path.name for path in folder.iterdir()) == [".owner", "owned"]  # the second has written nothing
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(20)
        with run_folder_owned(folder, ALONE):
            assert json.loads((folder / ".owner").read_text()) == {"pid": os.getpid(), "host": host}


def own_twice(world: World, folder: Path) -> int:
    for _ in range(2):  # as a run that is started again
        with run_folder_owned(folder, world):
            pid = json.loads((folder / ".owner").read_text())["pid"]
            launch.gather_objects(pid, world)  # rank 0 writes the file anew only when all have read it
    assert world.rank != 0 or pid == os.getpid()
    return int(pid)


@pytest.mark.dist
def test_all_ranks_of_a_run_are_one_owner(tmp_path: Path) -> None:
    pids = run_ranks(own_twice, 2, tmp_path / "run")
    assert len(set(pids)) == 1


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_a_live_process_of_this_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    live = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / owner._OWNER_FILE).write_text(json.dumps({"pid": live.pid, "host": socket.gethostname()}))
        with pytest.raises(CheckpointError, match=f"process {live.pid} on "), run_folder_owned(tmp_path, ALONE):
            pass
    finally:
        live.communicate()
    with run_folder_owned(tmp_path, ALONE):  # of a dead process
        assert json.loads((tmp_path / owner._OWNER_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', json.dumps({"pid": 1, "host": "elsewhere"})])
def test_what_an_earlier_owner_left_does_not_block(content: str, tmp_path: Path) -> None:
    (tmp_path / owner._OWNER_FILE).write_text(content)
    with run_folder_owned(tmp_path, ALONE):
        assert json.loads((tmp_path / owner._OWNER_FILE).read_text())["pid"] == os.getpid()


def test_a_full_disk_names_the_file_of_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnFullDisk(io.StringIO):
        def fail(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = fail  # closing flushes once more

    monkeypatch.setattr(Path, "open", lambda *_, **__: OnFullDisk())
    monkeypatch.setattr(owner.fcntl, "lockf", lambda *_: None)
    file = tmp_path / owner._OWNER_FILE
    with pytest.raises(OutsideError, match=f"{file}: no space left"), run_folder_owned(tmp_path, ALONE):
        pytest.fail("owned")
