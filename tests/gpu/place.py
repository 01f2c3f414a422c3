"""Where a test of tests/gpu runs: the same body on the CPU, in every run of the suite, and on a CUDA device.

Tests marked `gpu` are skipped without a device; with one they run in processes of their own (`make test-gpu`,
`sharpmoe gpu-check`), in which no other test runs.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from sharpmoe.devices import ACCELERATOR
from sharpmoe.parallel.ranks import launch
from tests.distributed import free_port, run_ranks, start_ranks

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]


_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def run_on(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(world, *args)` as a world of one: on the CPU in a process of its own, on CUDA in this one."""
    return run_ranks(function, 1, *args)[0] if device == "cpu" else function(launch.start(), *args)


def run_fresh(device: str, function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """The same on several ranks, in new processes on CUDA too: what a process reads at its start, or how it ends.

    Results are plain numbers and text. A rank that raises fails the test; all are ended at the time limit.
    """
    if device == "cpu":
        return run_ranks(function, num_ranks, *args, timeout=timeout)
    return spawned(device, function, num_ranks, *args, timeout=timeout)


def spawned(device: str, function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call a function on ranks in processes that are not forks."""
    port = free_port()
    with ProcessPoolExecutor(num_ranks, mp_context=_SPAWN) as pool:
        try:
            ranks = [pool.submit(_rank, device, rank, num_ranks, port, function, args) for rank in range(num_ranks)]
            return [rank.result(timeout) for rank in ranks]
        finally:
            for process in list((pool._processes or {}).values()):
                process.kill()


@contextmanager
def start_fresh(device: str, function: Callable[..., Any], num_ranks: int, *args: Any) -> Iterator[list[BaseProcess]]:
    """Start the same ranks and yield their processes, for tests of how they end; kill at the end what still runs."""
    if device == "cpu":
        with start_ranks(function, num_ranks, *args) as ranks:
            yield ranks
        return
    port = free_port()
    started: list[BaseProcess] = [
        _SPAWN.Process(target=_rank, args=(device, rank, num_ranks, port, function, args)) for rank in range(num_ranks)
    ]
    try:
        for process in started:
            process.start()
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def _rank(
    device: str, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ACCELERATOR: device}
    return function(launch.start(), *args)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
