"""Shards to the batches of a run. The only state is one number: how many samples the run has consumed."""

import itertools
import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from data_pipeline.schema import Batch
from data_pipeline.shards import ShardSet, sample_indices
from sharpmoe.errors import DataError

_PREFETCH_STEPS = 2


class _Steps(Dataset[tuple[Batch, ...] | DataError]):
    """One rank's share of every optimizer step, by step number."""

    def __init__(
        self, shards: ShardSet, seed: int, global_batch: int, micro_batch: int, rank: int, world: int, start: int
    ) -> None:
        self._shards, self._seed, self._start = shards, seed, start
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._share = range(rank * global_batch // world, (rank + 1) * global_batch // world, micro_batch)

    def __getitem__(self, step: int) -> tuple[Batch, ...] | DataError:
        """The accumulation micro-batches, or the error: torch would wrap one raised in a worker in its traceback."""
        try:
            return tuple(self._micro(self._start + step * self._global_batch + offset) for offset in self._share)
        except DataError as error:
            return error

    def _micro(self, first: int) -> Batch:
        positions = range(first, first + self._micro_batch)
        return self._shards.batch(sample_indices(self._shards.shard_sizes, self._seed, positions), positions)


def stream(
    shards: ShardSet,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int = 0,
    num_workers: int = 0,
) -> Iterator[tuple[Batch, ...]]:
    """The endless batches of one rank: one tuple of micro-batches per optimizer step.

    Step s covers the global positions start + s * global_batch and the global_batch - 1 after it, cut into
    micro-batches in order; rank r takes the r-th of `world` equal runs of them. So every rank gets the same count, the
    samples of a step do not depend on the world size or on `num_workers`, and a resumed run passes the number of
    samples consumed so far as `start`. Raises ValueError where micro_batch * world does not divide global_batch, and
    DataError (while iterating) where a sample is damaged. Does not communicate.
    """
    if global_batch % (micro_batch * world) or not 0 <= rank < world:
        raise ValueError(f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x world {world}")
    steps = _Steps(shards, seed, global_batch, micro_batch, rank, world, start)
    return _unwrapped(steps, num_workers)


def _unwrapped(steps: _Steps, num_workers: int) -> Iterator[tuple[Batch, ...]]:
    numbers = itertools.count()
    loaded = map(steps.__getitem__, numbers) if num_workers == 0 else _in_workers(steps, numbers, num_workers)
    try:
        for batches in loaded:
            if isinstance(batches, DataError):
                raise batches
            yield batches
    finally:
        # Let go of the workers here. A traceback would keep them, and where it is part of a reference cycle their
        # queues are closed before they are told to stop, for which each worker waits five seconds.
        del loaded


def _in_workers(steps: _Steps, numbers: Iterator[int], num_workers: int) -> Iterator[tuple[Batch, ...] | DataError]:
    """`num_workers` processes; DataLoader hands results on in the order of `numbers`."""
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_as_is,
            prefetch_factor=_PREFETCH_STEPS,
            worker_init_fn=_ignore_requests,
        )
    )


def _ignore_requests(worker: int) -> None:
    """A scheduler signals every process of a job; what a signal asks for is the training process's to decide.

    Readers end when they are told to, or with the process that they read for.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batches: Any) -> Any:
    """Torch's own collation would turn the tuples of keys and captions into lists."""
    return batches
