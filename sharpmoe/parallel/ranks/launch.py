"""Process set-up: the same world for every way of starting a run.

`deepspeed`, `torchrun` and `srun torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; plain `python` sets
nothing and becomes a world of one that needs no port.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from signal import Signals
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sharpmoe.errors import ConfigError, SharpMoEError
from sharpmoe.parallel.ranks import signals, watchdog

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns on every rank that it found nothing else
    # Some virtual machines advertise AMX and kill a process that uses it; oneDNN does, for bf16 on the host.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import deepspeed  # reads DS_ACCELERATOR
from deepspeed.utils import logger

_LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """Where this process stands: one data-parallel rank per device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that writes and prints."""
        return self.rank == 0


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group (nccl on CUDA, gloo on CPU) and return this process's place in it.

    Raises ConfigError where a launcher set only a part of its variables. Compiles nothing: DeepSpeed's shared-memory
    operator, which its CPU accelerator would build with g++ for minutes, serves inference only and is turned off.
    """
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, a line of noise each.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # SGD; tested here
    rank, size, local_rank = _place()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if size == 1 and "MASTER_PORT" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return World(rank, size, local_rank, device)


def is_main() -> bool:
    """Whether this process prints; answered without a process group, for errors before there is one."""
    return os.environ.get("RANK", "0") == "0"


def stop() -> None:
    """Leave the process group. For a clean end only: after an error, peers may still wait in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with an exit code, output flushed, without the interpreter's teardown.

    Threads of the process group may still run then and abort a rank that has finished its work (seen under gloo).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _place() -> tuple[int, int, int]:
    """(rank, size, local rank) from the launcher's variables, or a world of one."""
    given = [key for key in _LAUNCHER_KEYS if key in os.environ]
    if "RANK" not in given and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        return 0, 1, 0
    if len(given) < len(_LAUNCHER_KEYS):
        missing = ", ".join(key for key in _LAUNCHER_KEYS if key not in os.environ)
        raise ConfigError(f"environment: {missing} not set beside {', '.join(given)}; start with deepspeed or torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, size, int(os.environ.get("LOCAL_RANK", rank))


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of a tensor over all ranks, on its own device; one all-reduce, none in a world of one."""
    if world.size == 1:
        return values
    total = values.to(world.device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


def gather_objects(value: object, world: World) -> list[Any]:
    """Collect every rank's picklable value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(world: World, heed_signals: bool = False) -> Iterator[None]:
    """Turn an error of one rank into an error of all: nobody is left waiting in a later collective.

    The body must not communicate. One all-reduce of two numbers when all is well. Every rank raises the first
    failing rank's error, which names the rank where not all failed alike; else, with `heed_signals`, StopAskedError
    where a signal has asked any rank to stop (see `signals`).
    """
    error: SharpMoEError | None = None
    try:
        yield
    except SharpMoEError as caught:
        error = caught
    watchdog.mark()
    failed, signal = _worst([int(error is not None), signals.asked() if heed_signals else 0], world)
    if failed:
        raise common_error(gather_objects(error, world))
    if signal:
        raise signals.StopAskedError(Signals(signal).name)


def _worst(numbers: list[int], world: World) -> list[int]:
    """Maximum of each number over all ranks."""
    if world.size == 1:
        return numbers
    flags = torch.tensor(numbers, device=world.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [int(flag) for flag in flags.tolist()]


def common_error(errors: list[SharpMoEError | None]) -> SharpMoEError:
    """The first error; it names its rank unless every rank met the same one."""
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    rank, first = failed[0]
    if len(failed) == len(errors) and len({str(error) for _, error in failed}) == 1:
        return first
    return type(first)(f"rank {rank}: {first}")
