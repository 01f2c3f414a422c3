"""How a source reads its files: from the local disk, or from a remote place of which it sees a local stand-in."""

from pathlib import Path
from typing import BinaryIO, Protocol

from data_pipeline.sources.items import Place
from data_pipeline.sources.walk import file_size
from sharpmoe.errors import DataError

_LARGEST = 1 << 30  # bytes of an image file: 64 megapixels of 16 bits and four channels are half of it


class Files(Protocol):
    """The contents of the files of a source, by their local path. Safe in threads."""

    def size(self, path: Path) -> int | str:
        """Return the bytes of a file, or why it cannot be read."""
        ...

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading, with seek. Raises OSError or DataError where it cannot be read."""
        ...

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Return `size` bytes of a file from `start` on; fewer where it ends."""
        ...


class LocalFiles:
    """Files of the local disk."""

    def size(self, path: Path) -> int | str:
        return file_size(path)

    def open(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def read(self, path: Path, start: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)


LOCAL = LocalFiles()


def read_place(files: Files, root: Path, place: Place, limit: int | None = None) -> bytes:
    """Read an image file below `root`, or the first `limit` bytes of it.

    Raises OSError where the file cannot be opened, ValueError where it is too large to be an image, DataError where it
    is not as long as it was when it was listed.
    """
    if place.size > _LARGEST:
        raise ValueError(f"{place.size} bytes, at most {_LARGEST} are read")
    path = root / place.file
    if limit is not None:
        return files.read(path, place.offset, min(limit, place.size))
    content = files.read(path, place.offset, place.size if place.offset else place.size + 1)
    if len(content) != place.size:
        raise DataError(f"{path}: changed since it was listed; prepare into another --out")
    return content
