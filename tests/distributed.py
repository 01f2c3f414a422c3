"""Run a function on N gloo ranks: processes forked from a server that has imported everything once."""

import itertools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from sharpmoe.parallel.ranks import launch

_PORTS = itertools.count(os.getpid())  # sessions beside each other begin at different ports
CONTEXT = multiprocessing.get_context("forkserver")
# What a rank needs takes ten seconds and more to import: DeepSpeed decorates with torch.compile, Megatron-core is big.
CONTEXT.set_forkserver_preload(
    [
        "sharpmoe.train.loop",
        "sharpmoe.parallel.experts.megatron",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "tests.fixtures_data",
    ]
)


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 150.0) -> list[Any]:
    """Call `function(world, *args)` on `num_ranks` ranks and return their results in rank order.

    `function` is defined at the top of a module and returns something picklable. A rank that raises fails the test with
    its traceback; ranks that hang are killed `timeout` seconds after all have started.
    """
    ends: dict[Connection, int] = {}
    with _started(function, num_ranks, args, ends) as processes:
        # Not from before: the first start waits for what the server imports, minutes on a machine with other work.
        results = _collect(ends, time.monotonic() + timeout)
        for process in processes:
            process.join(5)
    return results


@contextmanager
def start_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> Iterator[list[BaseProcess]]:
    """Start the same ranks and yield their processes, for tests of how they end; kill at the end what still runs."""
    with _started(function, num_ranks, args, {}) as processes:
        yield processes


@contextmanager
def _started(
    function: Callable[..., Any], num_ranks: int, args: tuple[Any, ...], ends: dict[Connection, int]
) -> Iterator[list[BaseProcess]]:
    port = free_port()
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process: BaseProcess = CONTEXT.Process(
                target=_rank, args=(theirs, rank, num_ranks, port, function, args), daemon=True
            )
            process.start()
            theirs.close()
            ends[ours] = rank
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def free_port() -> int:
    """Return a TCP port that nothing listens on.

    It lies below those that the system hands out by itself, and test processes have ranges of their own: nothing takes
    it between this probe and its use.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 16_384 + worker % 8 * 2_000 + next(_PORTS) % 2_000
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _collect(ends: dict[Connection, int], deadline: float) -> list[Any]:
    """Return the results of all ranks; raise at the first failure, or at the deadline."""
    results: dict[int, Any] = {}
    pending = dict(ends)
    while pending:
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} did not finish in time")
        for end in ready:
            assert isinstance(end, Connection)
            rank = pending.pop(end)
            try:
                good, value = pickle.loads(end.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if not good:
                raise RuntimeError(f"rank {rank} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank(
    end: Connection, rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    try:
        answer = (True, function(launch.start(), *args))
    except BaseException:  # noqa: BLE001 (it becomes the test's failure)
        answer = (False, traceback.format_exc())
    # Plain pickle: torch's own shares tensors through files that are gone when this process ends.
    end.send_bytes(pickle.dumps(answer))
    end.close()
    if answer[0]:
        launch.stop()
    os._exit(0)  # peers of a failed rank may wait for ever
