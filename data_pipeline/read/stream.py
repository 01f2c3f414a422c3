"""The batches of a run. The state is the number of samples that the run has consumed."""

import atexit
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails, _remove_worker_pids

from data_pipeline.read.batches import collate
from data_pipeline.read.damage import Damage, DamageLedger
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.order import SampleOrder
from data_pipeline.read.samples import Draw, Sample
from data_pipeline.read.schedule import BatchSchedule, Pick, Start
from data_pipeline.read.shards import ShardSet
from data_pipeline.schema import Batch
from sharpmoe.errors import DataError, first_line

_PREFETCH_STEPS = 2


class Loaded(NamedTuple):
    """One rank's share of an optimizer step."""

    batches: tuple[Batch, ...]  # the accumulation micro-batches
    damage: tuple[Damage, ...]  # found while reading them; may repeat earlier damage
    consumed: Start  # after this step, over all ranks: what a checkpoint keeps


class _Share(NamedTuple):
    """Which part of every global batch a rank reads."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int


class _Steps(Dataset[Loaded | DataError]):
    """One rank's share of every optimizer step, by step number."""

    def __init__(self, data: Mixture, seed: int, layout: _Share, start: Start, max_bad_fraction: float) -> None:
        self._data, self._seed, self._layout, self._start = data, seed, layout, start
        self._schedule = BatchSchedule(data.streams, seed, layout.global_batch, start)
        self._orders = [SampleOrder(stream.shard_sizes, seed) for stream in data.streams]
        self._ledger = DamageLedger(data.num_samples, max_bad_fraction)  # of what this process has found

    def __getitem__(self, step: int) -> Loaded | DataError:
        """Return the share, or the error: torch would wrap an error raised in a worker in its traceback."""
        size, rank, world = self._layout.global_batch, self._layout.rank, self._layout.world
        share = range(rank * size // world, (rank + 1) * size // world, self._layout.micro_batch)
        damage: list[Damage] = []
        try:
            batches = tuple(self._micro(step, range(first, first + share.step), damage) for first in share)
        except DataError as error:
            return error
        samples = self._start.samples + (step + 1) * size
        return Loaded(batches, tuple(dict.fromkeys(damage)), Start(samples, self._schedule.counts(step + 1)))

    def _micro(self, step: int, offsets: range, damage: list[Damage]) -> Batch:
        first = self._start.samples + step * self._layout.global_batch
        positions = [first + offset for offset in offsets]
        picks = self._schedule.picks(step, offsets)
        samples = (self._sound(pick, place, damage) for pick, place in zip(picks, positions, strict=True))
        return collate(samples, positions, self._data.text_length)

    def _sound(self, pick: Pick, position: int, damage: list[Damage]) -> Sample:
        """Return the picked sample or, where it is damaged, the next sound one in the order of its stream."""
        for number in itertools.count(pick.number):
            index = self._orders[pick.stream].at(number).sample
            found = self._data.load(pick.stream, index, Draw(self._seed, position))
            damaged = [*self._data.flaws(), *([found] if isinstance(found, Damage) else [])]
            if damaged:
                self._ledger.add(damaged)
                damage += damaged
            if isinstance(found, Sample):
                return found
        raise AssertionError("unreachable: the order is endless")


def stream(
    data: Mixture | ShardSet,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int | Start = 0,
    num_workers: int = 0,
    max_bad_fraction: float = 0.0,
) -> Generator[Loaded, None, None]:
    """Yield the steps of one rank without end, read ahead: a tuple of micro-batches each.

    Step s covers the global positions start + s * global_batch and the global_batch - 1 after it, all of one bucket,
    cut into micro-batches in order; rank r takes the r-th of `world` equal parts. So every rank gets the same number,
    the samples of a step do not depend on the world size or on `num_workers` (0: a thread of this process), and a
    resumed run passes the last `Loaded.consumed`. Damaged samples are replaced by the next sound one in the order.
    Raises ValueError where micro_batch * world does not divide global_batch, and DataError (while iterating) where
    more than `max_bad_fraction` of the samples are damaged, or a reader process died. Closing the generator ends the
    readers. Does not communicate.
    """
    if global_batch % (micro_batch * world) or not 0 <= rank < world:
        raise ValueError(f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x world {world}")
    mixture = Mixture([data]) if isinstance(data, ShardSet) else data
    begin = Start(start) if isinstance(start, int) else start
    layout = _Share(global_batch, micro_batch, rank, world)
    loaded = _unwrapped(_Steps(mixture, seed, layout, begin, max_bad_fraction), num_workers)
    return _watched(loaded) if num_workers else loaded


def _unwrapped(steps: _Steps, num_workers: int) -> Generator[Loaded, None, None]:
    numbers = itertools.count()
    results = _in_thread(steps, numbers) if num_workers == 0 else _in_workers(steps, numbers, num_workers)
    with closing(results):
        for loaded in results:
            if isinstance(loaded, DataError):
                raise loaded
            yield loaded


def _in_thread(steps: _Steps, numbers: Iterator[int]) -> Generator[Loaded | DataError, None, None]:
    """Read in one thread, ahead of the caller by `_PREFETCH_STEPS`."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        ahead = deque(pool.submit(steps.__getitem__, next(numbers)) for _ in range(_PREFETCH_STEPS))
        try:
            while True:
                loaded = ahead.popleft().result()
                ahead.append(pool.submit(steps.__getitem__, next(numbers)))
                yield loaded
        finally:
            pool.shutdown(cancel_futures=True)


def _in_workers(steps: _Steps, numbers: Iterator[int], num_workers: int) -> Generator[Loaded | DataError, None, None]:
    """Read in `num_workers` processes; DataLoader returns results in the order of `numbers`."""
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_is,
        prefetch_factor=_PREFETCH_STEPS,
        worker_init_fn=_ignore_requests,
    )
    results = iter(loader)
    end = partial(_end_workers, results, os.getpid())
    atexit.register(end)  # of a script that ends without closing the stream; else Python waits for the workers forever
    try:
        yield from results
    finally:
        atexit.unregister(end)
        end()


def _end_workers(results: Any, owner: int) -> None:
    """End the workers of torch's iterator unless they are ended; it may be freed late, where a traceback keeps it.

    A worker that was killed may have held a lock for which the others, or this process, would wait: of the queue of
    results, or of the event that asks workers to end. Torch waits five seconds for each, and then again after a SIGTERM
    that readers ignore. So the others are killed too; they hold nothing but what they have read. owner: the process
    that started them; its forks leave them alone.
    """
    if results._shutdown or os.getpid() != owner:
        return
    workers = results._workers
    if all(worker.is_alive() for worker in workers):
        results._shutdown_workers()
    else:
        _remove_worker_pids(id(results))  # before they die: torch's handler would raise for each
        results._worker_pids_set, results._shutdown = False, True
        for queue in results._index_queues:
            queue.cancel_join_thread()
            queue.close()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()


def _ignore_requests(worker: int) -> None:
    """Ignore signals: a scheduler signals every process of a job, and only the training process decides what follows.

    Readers end when they are asked to, or with the process that they read for.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_is(loaded: Any) -> Any:
    """Return the value: torch's own collation would turn the tuples of keys and captions into lists."""
    return loaded


class _ReaderDied(BaseException):
    """Not an Exception: torch catches those while it waits for a result, and may then wait for a lock of the dead."""


def _watched(batches: Iterator[Loaded]) -> Generator[Loaded, None, None]:
    """Yield `batches`; a reader process that died since the last one, or dies while one is awaited, is a DataError.

    Torch would raise a RuntimeError wherever the main thread happens to be, also between two collectives of a step,
    which leaves the other ranks waiting; here it is raised from `next` only. Closing the generator ends the readers.
    """
    try:
        while True:
            try:
                with _dead_readers_raise():
                    batch = next(batches, None)
            except (RuntimeError, _ReaderDied) as error:
                if "DataLoader worker" not in str(error):
                    raise
                reason = first_line(error).rstrip(".").replace("DataLoader worker", "reader process")
                raise DataError(
                    f"data: {reason}; memory, or /dev/shm, may be too small: lower data.num_workers (0 reads without "
                    "processes) and go on from the last checkpoint"
                ) from None
            if batch is None:
                return
            yield batch
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


@contextmanager
def _dead_readers_raise() -> Iterator[None]:
    """Inside, the death of one of torch's data workers raises _ReaderDied at once; outside nothing does."""
    if threading.current_thread() is not threading.main_thread():
        _raise_if_dead()
        yield  # only the main thread may have handlers; torch itself checks every five seconds
        return
    outside = signal.signal(signal.SIGCHLD, lambda *_: _raise_if_dead())
    try:
        _raise_if_dead()
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if outside is None or _is_torchs(outside) else outside)


def _raise_if_dead() -> None:
    try:
        _error_if_any_worker_fails()
    except RuntimeError as error:
        raise _ReaderDied(str(error)) from None


def _is_torchs(handler: object) -> bool:
    """Return whether a handler is the one that torch installs with the first data workers of a process."""
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
