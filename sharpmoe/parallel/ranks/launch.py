"""Set up the process group, and the small exchanges between ranks that everything else uses.

`deepspeed`, `torchrun` and `srun torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; plain `python` sets
nothing and becomes a world of one that needs no port. Beside `parallel.zero` and `parallel.experts.groups` this is the
only module that imports DeepSpeed, and it uses public names only.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from sharpmoe.config import COLLECTIVE_SECONDS
from sharpmoe.devices import ACCELERATOR, device_count, device_identity, device_of_rank
from sharpmoe.errors import ConfigError, SharpMoEError, outside_error
from sharpmoe.parallel.ranks import signals, watchdog
from sharpmoe.parallel.ranks.cpus import bind_cpus

if not device_count():
    os.environ.setdefault(ACCELERATOR, "cpu")  # or DeepSpeed warns on every rank that it found nothing else
    # Some virtual machines advertise AMX and kill a process that uses it; oneDNN does, for bf16 on the host.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorBoard imports TensorFlow where there is one: errors only

import deepspeed  # reads ACCELERATOR
from deepspeed.utils import logger

GIB = 2**30
_MICRO = 1_000_000
_LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START = "start with deepspeed or torchrun"
_TIMEOUT = timedelta(seconds=COLLECTIVE_SECONDS)
_TORCH_TIMEOUTS = (distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout)
# This rank's number on its machine, as torchrun and deepspeed, Slurm, Open MPI and MPICH name it, and what else is set
# where the launcher has started this very process: a batch script of Slurm has a SLURM_LOCALID, too.
_LOCAL_RANKS = {
    "LOCAL_RANK": "",
    "SLURM_LOCALID": "SLURM_STEP_ID",
    "OMPI_COMM_WORLD_LOCAL_RANK": "",
    "MPI_LOCALRANKID": "",
}
_RANKS_ON_HOST = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # as torchrun and deepspeed name them
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container: a number of bytes, or "max"


class World(NamedTuple):
    """The place of this process among all: one data-parallel rank per device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0


def start(debug: bool = False) -> World:
    """Join the process group (nccl on CUDA, gloo on CPU) and return this process's place in it.

    Warnings of DeepSpeed, torch and Megatron-core are not shown unless `debug`; their errors are. Compiles nothing:
    DeepSpeed's shared-memory operator, which its CPU accelerator would build with g++ for minutes, is used in inference
    only and is disabled. Raises ConfigError where a launcher set only some of its variables, two ranks have one device,
    SHARPMOE_CPU_BINDING is wrong, or the port is taken; every rank that raises it prints it (`lone`), since there is no
    way yet to tell the others.
    """
    if not debug:
        _quiet_libraries()
    try:
        return _join()
    except ConfigError as error:
        error.lone = not error.agreed
        raise


def _join() -> World:
    rank, size, local_rank = _place()
    device = device_of_rank(local_rank)
    _tell_deepspeed(local_rank if device.index is None else device.index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bind_cpus(device, _ranks_on_host(size))
    if not dist.is_initialized():
        _start_group("nccl" if device.type == "cuda" else "gloo", rank, size)
        if device.type == "cuda" and size > 1:
            _check_devices_differ(device_identity(device), rank, size)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT)
    return World(rank, size, local_rank, device)


def _tell_deepspeed(index: int) -> None:
    """Set what DeepSpeed takes the index of the device from, also where one visible device per task makes it 0."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name == "LOCAL_RANK" or name in os.environ:  # it insists that the two agree
            os.environ[name] = str(index)


def _start_group(backend: str, rank: int, size: int) -> None:
    """Create the group of all ranks, and have every group after it, DeepSpeed's too, give up after the same time."""
    _set_timeouts((_TIMEOUT, _TIMEOUT))
    if size == 1 and "MASTER_PORT" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
        return
    with _name_taken_port():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)


def _set_timeouts(timeouts: tuple[timedelta, timedelta | None]) -> None:
    """Set after which time groups give up that are created without one; torch keeps that in two variables."""
    distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = timeouts


def _check_devices_differ(own: str, rank: int, size: int) -> None:
    """Raise ConfigError, on every rank, where two ranks of one machine have one device. Communicates by the store."""
    store = watchdog.connect("devices", COLLECTIVE_SECONDS)  # a node may start minutes after the others
    store.set(str(rank), f"{socket.gethostname()}: {own}")
    holders: dict[str, int] = {}
    for number, name in enumerate(store.multi_get([str(other) for other in range(size)])):
        first = holders.setdefault(name.decode(), number)
        if first != number:
            error = ConfigError(
                f"environment: ranks {first} and {number} have the same CUDA device ({name.decode()}); start one rank "
                "per device: fewer ranks per machine, or a CUDA_VISIBLE_DEVICES of its own for each"
            )
            error.agreed = True
            raise error


@contextmanager
def _name_taken_port() -> Iterator[None]:
    """Turn torch's error on a port in use into a ConfigError that names the port."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} is taken, probably by another run on this machine; start with `deepspeed --master_port "
            f"{int(port) + 1}` (torchrun: --master_port, else MASTER_PORT)"
        ) from error


def _quiet_libraries() -> None:
    """Hide what other libraries warn of, from every rank: names that they deprecate, untested pairs."""
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|megatron|apex)\b")
    logger.setLevel(logging.ERROR)


def is_main() -> bool:
    """Whether this process prints; needs no process group, so that errors before there is one can be printed."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))  # also of a rank that cannot be


def stop(clean: bool = True) -> None:
    """Leave the process group after a clean end.

    After an error it is left as it is where there are other ranks, which may wait in a collective: NCCL would wait with
    them for up to `COLLECTIVE_SECONDS` before it destroys the group. The process ends at once instead (`leave`), its
    connections break, and the launcher or the watchdog of the others ends them.
    """
    if dist.is_initialized() and (clean or dist.get_world_size() == 1):
        dist.destroy_process_group()
        _set_timeouts(_TORCH_TIMEOUTS)


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after flushing its output, without the interpreter's teardown.

    During the teardown, threads of the process group may abort a rank that has finished its work (seen under gloo).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _place() -> tuple[int, int, int]:
    """Return (rank, size, local rank) from the launcher's variables, or a world of one."""
    given = [key for key in _LAUNCHER_KEYS if key in os.environ]
    if "RANK" not in given and _number("WORLD_SIZE", "1") == 1:
        return 0, 1, 0
    if len(given) < len(_LAUNCHER_KEYS):
        missing = ", ".join(key for key in _LAUNCHER_KEYS if key not in os.environ)
        there = ", ".join(f"{key}={os.environ[key]}" for key in given)
        raise ConfigError(f"environment: {missing} not set beside {there}; {_START}, or unset {' '.join(given)}")
    rank, size, _ = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    if rank >= size:
        raise ConfigError(f"environment: RANK is {rank}, expected 0 to {size - 1} with WORLD_SIZE {size}; {_START}")
    return rank, size, _local_rank(rank)


def _local_rank(rank: int) -> int:
    """Return this rank's number on its machine; `rank` where nothing tells it.

    Ranks fill one machine after the other, so that modulo the devices of a machine the rank is that number.
    """
    for name, proof in _LOCAL_RANKS.items():
        if name in os.environ and (not proof or proof in os.environ):
            return _number(name)
    return rank


def _number(key: str, default: str = "") -> int:
    """Return an environment variable as a whole number >= 0. Raises ConfigError."""
    text = os.environ.get(key, default)
    if not text.isdecimal():
        raise ConfigError(f"environment: {key} is {text!r}, expected a whole number >= 0; {_START}")
    return int(text)


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the sum of a tensor over all ranks, on its own device. One all-reduce, none in a world of one."""
    if world.size == 1:
        return values
    total = values.to(world.device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def gather_objects(value: object, world: World) -> list[Any]:
    """Return every rank's picklable value, in rank order, on every rank. One all-gather, none in a world of one."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


class Slowest:
    """Seconds that a rank took in `raise_on_all_ranks`: its own, and after the context those of the slowest rank."""

    seconds = 0.0


@contextmanager
def raise_on_all_ranks(world: World, stop_on_signal: bool = False) -> Iterator[Slowest]:
    """Turn an error of one rank into an error on all, so that none is left waiting in a later collective.

    That is a SharpMoEError, or one of the system or torch (see `outside_error`). The body must not communicate, except
    through contexts like this one: their error is passed on as it is, and a rank that fails between two of them meets
    the others in the next. Costs one all-reduce of three numbers when no rank fails. Every rank raises the first
    failing rank's error, with the rank's number unless all ranks failed alike; otherwise, with `stop_on_signal`, every
    rank raises StopAskedError where a signal has asked any of them to stop (see `signals`).
    """
    error: SharpMoEError | None = None
    slowest = Slowest()
    try:
        yield slowest
    except SharpMoEError as caught:
        if caught.agreed:
            raise
        error = caught
    except Exception as caught:
        error = outside_error(caught)
        if error is None:
            raise
        error.__cause__ = caught
    watchdog.mark()
    numbers = [int(error is not None), signals.asked() if stop_on_signal else 0, round(slowest.seconds * _MICRO)]
    failed, signal, microseconds = _maxima(numbers, world)
    slowest.seconds = microseconds / _MICRO
    if failed:
        common = common_error(gather_objects(error, world))
        common.agreed = True
        raise common
    if signal:
        raise signals.StopAskedError(Signals(signal).name)


def _maxima(numbers: list[int], world: World) -> list[int]:
    """Return the maximum of each number over all ranks."""
    if world.size == 1:
        return numbers
    flags = torch.tensor(numbers, device=world.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [int(flag) for flag in flags.tolist()]


def common_error(errors: list[SharpMoEError | None]) -> SharpMoEError:
    """Return the first of all ranks' errors, with its rank's number unless every rank has the same error."""
    failed = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    rank, first = failed[0]
    if len(failed) == len(errors) and len({str(error) for _, error in failed}) == 1:
        return first
    return type(first)(f"rank {rank}: {first}")


def least_memory(world: World) -> float:
    """Return the memory of the smallest device of all ranks in GiB. One all-reduce, none in a world of one."""
    least = torch.tensor(_own_memory(world), dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def _own_memory(world: World) -> float:
    """Return GiB of this rank's accelerator; without one, its share of the memory of the host or its container."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory) / GIB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _MEMORY_LIMIT.read_text(encoding="ascii").strip() if _MEMORY_LIMIT.is_file() else "max"
    return min(total, total if limit == "max" else int(limit)) / GIB / _ranks_on_host(world.size)


def _ranks_on_host(size: int) -> int:
    """Return how many ranks this machine has: all, where nothing tells that there are other machines."""
    return next((int(os.environ[name]) for name in _RANKS_ON_HOST if name in os.environ), size)
