"""What a kind of remote place is: byte ranges of its files, and the error of a request that is worth another try."""

from typing import Protocol


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
