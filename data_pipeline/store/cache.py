"""A bounded cache of blocks in a folder of the local disk, shared by all processes."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sharpmoe.errors import DataError

_USAGE, _KEPT = "usage", 0.875  # a full cache is emptied to this share, least recently used first


class _Block(NamedTuple):
    used: float
    size: int
    path: str


class BlockCache:
    """Blocks of bytes by label. A block appears complete or not at all; an evicted one can be read to its end."""

    def __init__(self, folder: Path, limit: int, block: int) -> None:
        """`limit` bytes in all, of which every block takes at most `block`."""
        if limit < 8 * block:
            raise DataError(f"cache of {limit} bytes: expected {8 * block} or more")
        self._folder, self._limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                pass
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a cache ({error.strerror}); choose another") from None

    def read(self, label: str, start: int, stop: int) -> bytes | None:
        """Return bytes start .. stop - 1 of a block, fewer where it ends; None where it is not cached."""
        path = self._path(label)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            os.utime(descriptor)  # recently used blocks are kept
            return os.pread(descriptor, stop - start, start)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def write(self, label: str, content: bytes) -> None:
        """Cache a block; where the disk is full it is not cached."""
        path = self._path(label)
        temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}.part")
        try:
            self._reserve(len(content))
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def _reserve(self, size: int) -> None:
        """Count `size` bytes before they are written, so that a killed process never leaves more than is counted."""
        with self._locked():
            usage = self._folder / _USAGE
            try:
                used = int(usage.read_text())
            except (OSError, ValueError):
                used = self._evicted(self._limit)
            if used + size > self._limit:
                used = self._evicted(int(self._limit * _KEPT) - size)
            usage.write_text(str(used + size))

    def _evicted(self, target: int) -> int:
        """Delete the least recently used blocks until `target` bytes are left; return the bytes left."""
        blocks = sorted(self._blocks())
        used = sum(block.size for block in blocks)
        for block in blocks:
            if used <= target:
                break
            Path(block.path).unlink(missing_ok=True)
            used -= block.size
        return used

    def _blocks(self) -> Iterator[_Block]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith((".block", ".part")):
                    try:
                        stat = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # renamed or evicted by another process
                        continue
                    yield _Block(stat.st_mtime, stat.st_size, entry.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, label: str) -> Path:
        """Return a path made of a hash: no server and no credential determines a file name."""
        return self._folder / f"{hashlib.sha256(label.encode()).hexdigest()[:40]}.block"
