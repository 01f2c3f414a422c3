"""One owner per run folder: the ranks of one live run. A second run in the folder would mix its files with theirs."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from sharpmoe.errors import CheckpointError
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks

_OWNER_FILE = ".owner"  # in the run folder: who writes it; locked for as long as that process lives


class _Owner(NamedTuple):
    """Contents of `_OWNER_FILE`: rank 0 of the run."""

    pid: int
    host: str


@contextmanager
def run_folder_owned(folder: Path, world: World) -> Iterator[None]:
    """Make the run folder and own it within the context, for all ranks of the run: rank 0 holds a lock.

    Communicates. Raises CheckpointError on every rank where another live process owns the folder, OutsideError where it
    cannot be written to. The system drops the
    lock of a process that ends, however it ends, so a run that was killed can be started again at once. It is a lock of
    the process (fcntl), not of the open file (flock): workers that the run forks do not keep it.
    """
    file: IO[str] | None = None
    with raise_on_all_ranks(world):
        if world.is_main:
            file = _lock(folder)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def check_unowned(folder: Path) -> None:
    """Raise CheckpointError where a live process owns the run folder. Changes nothing, no communication."""
    if not (folder / _OWNER_FILE).is_file():
        return
    with (folder / _OWNER_FILE).open(encoding="utf-8") as file:
        other = _read(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # refused where another process has the lock
        except (BlockingIOError, PermissionError):
            raise _owned_by(other, folder) from None
        except OSError:
            _check_by_pid(other, folder)


def _lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _OWNER_FILE).open("a+", encoding="utf-8")
    try:
        _claim(folder, file)
    except OSError as error:
        with suppress(OSError):  # of a full disk it fails again, on what is still to be written
            file.close()
        error.filename = error.filename or str(folder / _OWNER_FILE)
        raise
    except BaseException:
        file.close()
        raise
    return file


def _claim(folder: Path, file: IO[str]) -> None:
    me, other = _Owner(os.getpid(), socket.gethostname()), _read(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _owned_by(other, folder) from None
    except OSError:  # a file system without locks: of processes on other hosts nothing is known
        if other != me:
            _check_by_pid(other, folder)
    file.truncate(0)
    file.write(json.dumps(me._asdict()))
    file.flush()


def _check_by_pid(other: _Owner | None, folder: Path) -> None:
    """Raise CheckpointError where the owner that the file names is alive on this host."""
    if other is not None and other.host == socket.gethostname() and _is_alive(other.pid):
        raise _owned_by(other, folder) from None


def _read(file: IO[str]) -> _Owner | None:
    try:
        file.seek(0)
        return _Owner(**json.loads(file.read()))
    except (ValueError, TypeError):  # empty: the owner has just made it
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _owned_by(owner: _Owner | None, folder: Path) -> CheckpointError:
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
    return CheckpointError(
        f"{folder}: {who} is running in this folder; wait until it ends, or give the run a --name of its own"
    )
