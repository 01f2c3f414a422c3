"""Memory of a rank's device, as all ranks agree on it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from sharpmoe.parallel.ranks.launch import World

GIB = 2**30
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container: a number of bytes, or "max"
_RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # as torchrun and deepspeed name them


def least_memory(world: World) -> float:
    """GiB of the smallest device of all ranks. Communicates: one all-reduce, none in a world of one."""
    least = torch.tensor(own_memory(world), dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def own_memory(world: World) -> float:
    """GiB of this rank's accelerator; without one its share of what the host, or its container, has."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory) / GIB
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text(encoding="ascii").strip() if _LIMIT.is_file() else "max"
    ranks = next((int(os.environ[name]) for name in _RANKS_HERE if name in os.environ), world.size)
    return min(there, there if limit == "max" else int(limit)) / GIB / ranks
