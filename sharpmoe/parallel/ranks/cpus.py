"""The CPUs of a rank: those of the NUMA node that its GPU is on, where the job asks for them.

`torchrun --numa-binding` does the same and ends a run where numactl is missing, where there is no GPU, or where Slurm
gave the job no CPU near one of its GPUs. Here such a rank keeps the CPUs that it was given. Each rank still sees every
GPU: one visible GPU per task, as with `srun --gpu-bind=closest`, can keep NCCL from copying between them directly.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sharpmoe.devices import device_count
from sharpmoe.errors import ConfigError

CPU_BINDING = "SHARPMOE_CPU_BINDING"  # set in launcher/slurm/posttrain.sbatch
_ALLOWED = ("gpu", "none")
_SYSTEM = Path("/sys")
_THREADS = Path("/proc/self/task")


def bind_cpus(device: torch.device, ranks_on_host: int) -> None:
    """Keep this process, and the threads and processes that it starts, on the CPUs near its GPU.

    Done where SHARPMOE_CPU_BINDING is `gpu` and the rank computes on a GPU. Never on a CPU that the process was not
    given, and not at all where the CPUs near the GPU, shared by all ranks with a GPU on that node, are less than three
    quarters of a fair share of those given. Raises ConfigError where the variable is neither `gpu` nor `none`.
    """
    given = os.environ.get(CPU_BINDING, "none")
    if given not in _ALLOWED:
        raise ConfigError(f"environment: {CPU_BINDING} is {given!r}, allowed: {' or '.join(_ALLOWED)}; correct it")
    if given == "none" or device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    near = allowed & _cpus_near(device)
    others = [_cpus_near(torch.device("cuda", rank % device_count())) for rank in range(ranks_on_host)]
    sharing = sum(bool(near & cpus) for cpus in others)
    if 4 * len(near) * ranks_on_host < 3 * len(allowed) * sharing or not near:
        return
    for thread in _own_threads():
        with suppress(OSError):  # it has ended
            if os.sched_getaffinity(thread) == allowed:  # otherwise someone has placed it
                os.sched_setaffinity(thread, near)


def _cpus_near(device: torch.device) -> set[int]:
    """Return the CPUs of the NUMA node of a GPU; none where the system does not say."""
    gpu: Any = torch.cuda.get_device_properties(device)  # the stubs lack its address
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((_SYSTEM / "bus/pci/devices" / address / "numa_node").read_text(encoding="ascii"))
        return _cpus_in((_SYSTEM / f"devices/system/node/node{node}/cpulist").read_text(encoding="ascii"))
    except (OSError, ValueError):  # a node of -1: the machine has only one, or a virtual machine hides them
        return set()


def _cpus_in(ranges: str) -> set[int]:
    """Return the numbers of a list like `0-3,8,12-15`. Raises ValueError."""
    ends = [part.partition("-") for part in ranges.strip().split(",") if part]
    return {number for first, _, last in ends for number in range(int(first), int(last or first) + 1)}


def _own_threads() -> Iterator[int]:
    """Yield the threads of this process, this one first: those that it starts meanwhile are like it."""
    yield 0
    with suppress(OSError):  # a system without /proc: threads that there are stay where they are
        yield from (int(thread.name) for thread in _THREADS.iterdir() if thread.name != str(os.getpid()))
