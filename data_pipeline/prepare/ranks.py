"""Several processes that prepare one folder. They share files and need no network between them."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sharpmoe.errors import DataError

PATIENCE_S = 120.0  # without any progress of the others, before a rank does their part as well
_POLL_S = 0.2
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
        return int(digest[:16], 16) % self.size == self.rank


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
    """Return `cuda` as the device of this rank: by local rank where the launcher shows every process all devices."""
    alone = len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return f"cuda:{0 if alone else place.local}" if device == "cuda" and place.size > 1 else device


def wait(left: Callable[[], int]) -> bool:
    """Wait until `left()` is 0. Return False after `PATIENCE_S` without a change: a rank has died."""
    before, since = left(), time.monotonic()
    while before:
        time.sleep(_POLL_S)
        now = left()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            return False
    return True


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Make the folder and hold its lock: for one process alone, or (`shared`) for the ranks of one run.

    The lock saves work and detects mistakes; nothing breaks without it, so file systems without locks are allowed.
    Raises DataError where another process holds the lock, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this folder; wait for it") from None
        except OSError:
            pass
        yield
