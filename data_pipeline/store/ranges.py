"""What a kind of remote place is: byte ranges of its files, and the error of a request that is worth another try."""

import logging
import random
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from sharpmoe.errors import DataError

_LONGEST_PAUSE_S = 30.0
_Result = TypeVar("_Result")
_jitter = random.SystemRandom()  # not the generator that a run has seeded
_log = logging.getLogger(__name__)


class TransientError(Exception):
    """A failure that may pass: a busy server, a cut connection, a time-out. Never leaves data_pipeline."""

    def __init__(self, what: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s  # pause that the server requests


class Ranges(Protocol):
    """One kind of remote place. Raises TransientError for what may pass, DamageError where a file does not exist."""

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes start .. stop - 1; fewer only where the file ends."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...


def with_retries(where: str, act: Callable[[], _Result], retries: int = 6, pause_s: float = 0.5) -> _Result:
    """Return what `act` returns; after a TransientError try again after a growing pause. Raises DataError."""
    for attempt in range(retries + 1):
        try:
            return act()
        except TransientError as error:
            last = error
        if attempt < retries:
            pause = min(pause_s * 2**attempt, _LONGEST_PAUSE_S)
            pause = max(pause * _jitter.uniform(0.8, 1.2), min(last.retry_after_s, _LONGEST_PAUSE_S))
            _log.info("%s: %s; trying again in %.1f s", where, last, pause)
            time.sleep(pause)
    raise DataError(f"{where}: {last} ({retries + 1} tries); check the network and the server")
