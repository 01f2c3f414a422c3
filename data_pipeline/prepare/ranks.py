"""Several processes that prepare one folder. They share files and need no network between them."""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from sharpmoe.devices import device_of_rank
from sharpmoe.errors import DataError

_PATIENCE_S = 120.0  # without a sign of life of the ranks that are waited for
_POLL_S = 0.2
_BEAT_S = 2.0  # between two signs of life
# Rank, number of ranks and rank on its node, as launchers name them. The variables of Slurm are also set in a batch
# script; only SLURM_STEP_ID says that `srun` has started this process.
_SPELLINGS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", None),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", None),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", None),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),
)


class Rank(NamedTuple):
    """This process among those that prepare one folder."""

    rank: int = 0
    size: int = 1
    local: int = 0  # on its machine

    def owns(self, digest: str) -> bool:
        """Return whether work with this hash belongs to this rank; every piece belongs to exactly one."""
        return self.owner(digest) == self.rank

    def owner(self, digest: str) -> int:
        """Return the rank to which work with this hash belongs."""
        return int(digest[:16], 16) % self.size


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Return the rank of this process under torchrun, deepspeed, srun or mpirun; plain python is the only rank.

    Raises DataError where the environment is inconsistent.
    """
    for rank, size, local, proof in _SPELLINGS:
        if rank in environment and size in environment and (proof is None or proof in environment):
            try:
                found = Rank(int(environment[rank]), int(environment[size]), int(environment.get(local, 0)))
            except ValueError:
                raise DataError(
                    f"environment: {rank}={environment[rank]}, {size}={environment[size]}: expected whole numbers"
                ) from None
            if not 0 <= found.rank < found.size:
                raise DataError(f"environment: {rank}={found.rank} of {size}={found.size}: no such rank")
            return found
    return Rank()


def device_of(device: str, place: Rank) -> str:
    """Return `cuda` as the device of this rank: by its number on its machine, modulo the devices that it sees."""
    return str(device_of_rank(place.local)) if device == "cuda" and place.size > 1 else device


@contextmanager
def heartbeat(folder: Path, place: Rank) -> Iterator[None]:
    """Show the other ranks, by the time of a file in `folder`, that this one is alive."""
    if place.size == 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = _alive_file(folder, place.rank)
    path.touch()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with suppress(OSError):  # the folder may be removed by the last rank, and is not made again
                os.utime(path)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def pulse(folder: Path, rank: int) -> int:
    """Return a number that changes as long as a rank is alive; -1 where it has never been."""
    try:
        return _alive_file(folder, rank).stat().st_mtime_ns
    except OSError:
        return -1


def _alive_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.alive"


def wait(left: Callable[[], object]) -> bool:
    """Wait until `left()` is false. Return False after `_PATIENCE_S` without a change of it: a rank has died.

    `left` returns what is still to come and the pulse of those who do it, so that a slow rank is waited for.
    """
    before, since = left(), time.monotonic()
    while before:
        time.sleep(_POLL_S)
        now = left()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > _PATIENCE_S:
            return False
    return True


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Make the folder and hold its lock: for one process alone, or (`shared`) for the ranks of one run.

    The lock saves work and detects mistakes; nothing breaks without it, so file systems without locks are allowed.
    A folder that was made here is removed again where the body fails before it has written anything.
    Raises DataError where another process holds the lock, or where the folder cannot be written.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
    try:
        with _locked(file, folder, shared):
            yield
    except BaseException:
        if new and [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(file: TextIO, folder: Path, shared: bool) -> Iterator[None]:
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this folder; wait for it") from None
        except OSError:
            pass
        yield
