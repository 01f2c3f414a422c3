"""Where shards lie: a folder, or a place in the network. A store hands out bytes, and believes nothing of them."""

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

    DamageError means that a file is gone or shorter than asked; DataError that the place cannot be used at all.
    """

    location: str  # as it may be shown: no credentials

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        """Exactly `size` bytes of a file from `offset` on; `fresh` where a cached copy proved to be damaged."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def small(self, name: str) -> bytes:
        """All of a small file: an index, a table."""
        ...


def open_store(location: str | Path, remote: RemoteOptions | None = None) -> Store:
    """The store of a folder or of a URL (http, https, s3, gs); DataError for any other scheme.

    ${NAME} in a URL is taken from the environment.
    """
    scheme = scheme_of(location) if isinstance(location, str) else None
    if scheme is None:
        return LocalStore(Path(location))
    return RemoteStore(expand(str(location)), remote or RemoteOptions())


class LocalStore:
    """A folder, read with pread: a file cut short under our feet is an error, where a memory map would be a crash."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._folder = folder
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> descriptor

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        """See Store; a folder is always fresh."""
        if self._process != os.getpid():  # forked: descriptors and a lock that may be held are the parent's
            self._reset()
        with self._lock:
            return self._exactly(self._descriptor(name), name, offset, size)

    def size(self, name: str) -> int:
        """See Store."""
        try:
            return os.stat(f"{self.location}/{check_name(name)}").st_size
        except OSError as error:
            raise self._gone(name, error) from None

    def small(self, name: str) -> bytes:
        """See Store."""
        size = self.size(name)
        if size > CAPS.small:
            raise DamageError(f"{self._folder / name}: {size} bytes, at most {CAPS.small} are read at once")
        descriptor = self._opened(name)  # anew: an index may be written anew
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
        try:  # without blocking: a pipe of that name would wait for ever
            descriptor = os.open(self._folder / check_name(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._gone(name, error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamageError(f"{self._folder / name}: not a regular file")
        return descriptor

    def _exactly(self, descriptor: int, name: str, offset: int, size: int) -> bytes:
        """One pread gives at most 2 GiB, and may give less; nothing at all is the file's end."""
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
        """Descriptors and locks belong to one process."""
        return {"location": self.location, "_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with no file open."""
        self.__dict__.update(state)
        self._reset()

    def __del__(self) -> None:
        """Close what this process opened."""
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
