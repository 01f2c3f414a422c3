"""Batches from reader processes that may die: an error of one line at the next batch, and no process left behind."""

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails

from sharpmoe.errors import DataError

T = TypeVar("T")


def watched(batches: Iterator[T]) -> Generator[T, None, None]:
    """Hand `batches` on; a reader process that died since the last one, or dies while one is awaited, is a DataError.

    Torch would raise a RuntimeError wherever the main thread happens to be, also between two collectives of a step,
    which leaves the other ranks waiting; here it is raised from `next` only. Closing the generator ends the readers.
    """
    try:
        while True:
            try:
                with _deaths_are_errors():
                    batch = next(batches, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                reason = str(error).splitlines()[0].strip().rstrip(".").replace("DataLoader worker", "reader process")
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
def _deaths_are_errors() -> Iterator[None]:
    """Inside, the death of one of torch's data workers raises RuntimeError at once; outside nothing does."""
    _error_if_any_worker_fails()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers; torch still looks every five seconds
        return
    outside = signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if outside is None or _is_torchs(outside) else outside)


def _is_torchs(handler: object) -> bool:
    """Whether a handler is the one that torch leaves behind with the first data workers of a process."""
    return getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
