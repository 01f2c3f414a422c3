"""Where shards are stored: a local folder or a remote place. A store returns bytes, which the reader must check."""

import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.safety import CAPS, check_name, expand, scheme_of
from data_pipeline.store.remote import RemoteOptions, RemoteStore
from sharpmoe.errors import DamageError

_OPEN_FILES = 128  # per process; the oldest is closed


class Store(Protocol):
    """Files of one folder, by name. Safe in threads and in DataLoader workers.

    DamageError means that a file does not exist or is too short; DataError that the place cannot be used at all.
    """

    location: str  # as it may be shown: no credentials

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        """Return exactly `size` bytes of a file from `offset`; `fresh`: bypass a cached copy that is damaged."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def small(self, name: str) -> bytes:
        """Return the content of a small file: an index, a table."""
        ...


def open_store(location: str | Path, remote: RemoteOptions | None = None) -> Store:
    """Return the store of a folder or of a URL (http, https, s3, gs). Raises DataError for any other scheme.

    ${NAME} in a URL is taken from the environment.
    """
    scheme = scheme_of(location) if isinstance(location, str) else None
    if scheme is None:
        return LocalStore(Path(location))
    return RemoteStore(expand(str(location)), remote or RemoteOptions())


class LocalStore:
    """A local folder, read with pread: a file that is truncated meanwhile is an error; a memory map would crash."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> descriptor

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        if self._process != os.getpid():  # forked: descriptors and a lock that may be held are the parent's
            self._reset()
        with self._lock:
            return self._exactly(self._descriptor(name), name, offset, size)

    def size(self, name: str) -> int:
        try:
            return os.stat(f"{self.location}/{check_name(name)}").st_size
        except OSError as error:
            raise self._gone(name, error) from None

    def small(self, name: str) -> bytes:
        size = self.size(name)
        if size > CAPS.small:
            raise DamageError(f"{self._folder / name}: {size} bytes, at most {CAPS.small} are read")
        descriptor = self._opened(name)  # opened again: an index may be replaced
        try:
            return self._exactly(descriptor, name, 0, size)
        finally:
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        descriptor = self._files.get(name)
        if descriptor is None:
            descriptor = self._files[name] = self._opened(name)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _opened(self, name: str) -> int:
        try:  # without blocking: a pipe would wait forever
            descriptor = os.open(self._folder / check_name(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._gone(name, error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamageError(f"{self._folder / name}: not a regular file")
        return descriptor

    def _exactly(self, descriptor: int, name: str, offset: int, size: int) -> bytes:
        """Read `size` bytes: one pread returns at most 2 GiB, and may return less; nothing is the end of the file."""
        try:
            content = os.pread(descriptor, size, offset)
            while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
                content += more
        except OSError as error:
            raise self._gone(name, error) from None
        if len(content) < size:
            raise DamageError(f"{self._folder / name}: ends {size - len(content)} bytes before a sample does")
        return content

    def _gone(self, name: str, error: OSError) -> DamageError:
        return DamageError(f"{self._folder / name}: cannot be read ({error.strerror})")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out descriptors and locks, which belong to one process."""
        return {"location": self.location, "_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
