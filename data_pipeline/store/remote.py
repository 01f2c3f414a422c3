"""Remote shards: byte ranges over http(s), s3 or gs, through a bounded cache on the local disk."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.safety import CAPS, check_name, redact
from data_pipeline.store.cache import BlockCache
from data_pipeline.store.cloud import CloudFolder
from data_pipeline.store.http_ranges import HttpRanges
from data_pipeline.store.ranges import Ranges, with_retries
from sharpmoe.errors import DamageError, DataError

BLOCK = 4 << 20  # bytes fetched at a time: samples near each other are read soon after each other
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How remote shards are read."""

    cache: Path | None = None  # None: ~/.cache/sharpmoe/shards; may be shared by runs and processes
    cache_bytes: int = 16 << 30  # of the whole cache folder
    timeout_s: float = 30.0  # without a byte; a whole request may take ten times as long
    retries: int = 6  # after the first try, with pauses of 0.5, 1, 2, ... 30 s
    pause_s: float = 0.5
    allow_hosts: tuple[str, ...] = ()  # further hosts (or host:port) that redirects may lead to


# Readers of byte ranges by scheme. To add one, write a class with the methods of `store.ranges.Ranges`, add a row here
# and the scheme to safety.SCHEMES.
RANGES: dict[str, Callable[[str, RemoteOptions], Ranges]] = {
    "http": lambda url, options: HttpRanges(url, options.timeout_s, options.allow_hosts),
    "https": lambda url, options: HttpRanges(url, options.timeout_s, options.allow_hosts),
    "s3": lambda url, options: CloudFolder(url, options.timeout_s),
    "gs": lambda url, options: CloudFolder(url, options.timeout_s),
}


class RemoteStore:
    """A Store over byte ranges. Connections belong to one process; the cache is shared."""

    def __init__(self, location: str, options: RemoteOptions) -> None:
        self.location = redact(location)
        self._url, self._options = location, options
        if options.retries < 0 or options.timeout_s <= 0 or options.pause_s < 0:
            raise DataError(
                f"{self.location}: retries {options.retries}, pause {options.pause_s} s, "
                f"time-out {options.timeout_s} s; expected retries and pauses of 0 or more, and a time-out above 0 s"
            )
        folder = options.cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sharpmoe/shards"
        self._cache = BlockCache(folder, options.cache_bytes, BLOCK)
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        self._ranges = RANGES[self._url.partition(":")[0].lower()](self._url, self._options)

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        """Read through the cache, which `fresh` replaces."""
        pieces = []
        for number in range(offset // BLOCK, -(-(offset + size) // BLOCK)):
            start = max(offset - number * BLOCK, 0)
            stop = min(offset + size - number * BLOCK, BLOCK)
            pieces.append(self._piece(name, number, start, stop, fresh))
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(content) != size:
            raise DamageError(f"{self.location}/{name}: ends {size - len(content)} bytes before a sample does")
        return content

    def size(self, name: str) -> int:
        check_name(name)
        return self._retry(name, lambda ranges: ranges.size(name))

    def small(self, name: str) -> bytes:
        """Read a small file, never from the cache: an index may be replaced."""
        size = self.size(name)
        if size > CAPS.small:
            raise DamageError(f"{self.location}/{name}: {size} bytes, at most {CAPS.small} are read")
        return b"".join(self._fetch(name, start, min(start + 8 * BLOCK, size)) for start in range(0, size, 8 * BLOCK))

    def _piece(self, name: str, number: int, start: int, stop: int, fresh: bool) -> bytes:
        """Return bytes start .. stop - 1 of one block."""
        label = f"{self._url}\0{check_name(name)}\0{number}"
        cached = None if fresh else self._cache.read(label, start, stop)
        if cached is not None and len(cached) == stop - start:
            return cached
        block = self._fetch(name, number * BLOCK, (number + 1) * BLOCK)
        self._cache.write(label, block)
        return block[start:stop]

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        return self._retry(name, lambda ranges: ranges.fetch(name, start, stop))

    def _retry(self, name: str, act: Callable[[Ranges], _Result]) -> _Result:
        """Return what `act` returns; after a TransientError try again after a growing pause. Raises DataError."""
        if self._process != os.getpid():  # forked
            self._connect()
        act_now = partial(act, self._ranges)
        return with_retries(f"{self.location}/{name}", act_now, self._options.retries, self._options.pause_s)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out connections and locks, which belong to one process."""
        return {"location": self._url, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteStore.__init__(self, state["location"], state["options"])
