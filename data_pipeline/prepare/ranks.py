"""Several processes that prepare one folder. They share files and need no network between them."""

import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sharpmoe.errors import DataError

PATIENCE_S = 120.0  # without any progress of the others, before a rank does their part itself
_POLL_S = 0.2
# Rank, number of ranks and rank on its node, as launchers spell them. SLURM's variables are also in the environment
# of a batch script, where they do not mean that `srun` has started us: SLURM_STEP_ID does.
_SPELLINGS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", None),  # torchrun, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", None),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", None),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),
)


class Rank(NamedTuple):
    """Where this process stands."""

    rank: int = 0
    size: int = 1
    local: int = 0  # on its machine

    def owns(self, digest: str) -> bool:
        """Whether work with this hash is this rank's; every piece belongs to exactly one."""
        return int(digest[:16], 16) % self.size == self.rank


def rank_of(environment: Mapping[str, str]) -> Rank:
    """This process's rank under torchrun, deepspeed, srun or mpirun, or the only one under plain python."""
    for rank, size, local, witness in _SPELLINGS:
        if rank in environment and size in environment and (witness is None or witness in environment):
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
    """`cuda` as this rank's own device; launchers that show every process all devices count them by local rank."""
    alone = len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return f"cuda:{0 if alone else place.local}" if device == "cuda" and place.size > 1 else device


def wait(left: Callable[[], int]) -> bool:
    """Wait until `left` is 0. False where it has not changed for `PATIENCE_S`: somebody is gone, or very slow."""
    before, since = left(), time.monotonic()
    while before:
        time.sleep(_POLL_S)
        now = left()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S:
            return False
    return True
