"""Sources at a URL: a local stand-in of the place, which every kind of source reads as if the files were there.

The stand-in is a temporary folder with the names and sizes of all files, empty on the disk. Only captions and tables of
text are copied into it; pictures, and the parts of tars and .parquet tables that are needed, are read by byte ranges.
"""

import atexit
import errno
import io
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from data_pipeline.identity import Identity
from data_pipeline.safety import expand, redact, scheme_of
from data_pipeline.sources.captions import CAPTION_SUFFIXES
from data_pipeline.sources.captions import MAX_BYTES as CAPTION_BYTES
from data_pipeline.sources.files import LOCAL
from data_pipeline.sources.items import ImageSource, Item, Skipped, Unit, shown, unit_beside
from data_pipeline.sources.walk import file_size
from data_pipeline.store.cloud import CloudFolder
from data_pipeline.store.ranges import Ranges, with_retries
from data_pipeline.store.remote import RANGES, RemoteOptions
from sharpmoe.errors import DataError

_COPIED_TABLES = (".jsonl", ".csv", ".tsv")
_WHOLE = (".tar", ".parquet", ".arrow")  # kinds of one file that is a source by itself
_IDX = "-ubyte"  # in the names of IDX files, which are small
_BLOCK = 4 << 20  # bytes read ahead in a tar or table
_PIECE = 32 << 20  # bytes of a file that are copied at a time
_FIRST_RETRIES = 1  # of the first request: a place that cannot be used is said soon
_COPIES = 16  # files copied at a time
# A name that this machine's file system cannot have.
_NAMES = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ)
_T = TypeVar("_T")


class Remote(NamedTuple):
    """A place at a URL, seen through its stand-in."""

    path: Path  # of the stand-in: a folder, or the file that the URL names
    files: "RemoteFiles"
    wrap: Callable[[ImageSource], ImageSource]  # adds what could not be listed, and shows the URL in messages


class RemoteFiles:
    """The contents of the files of a stand-in."""

    def __init__(self, ranges: Ranges, url: str, root: Path, sizes: dict[str, int]) -> None:
        """`sizes`: bytes of the files that are not copied, by their names below `root`."""
        self._ranges, self._url, self._root, self._sizes = ranges, url, root, sizes

    def size(self, path: Path) -> int | str:
        return f"outside of {self._url}" if self._name(path) is None else file_size(path)

    def open(self, path: Path) -> BinaryIO:
        name = self._name(path)
        if name not in self._sizes:
            return LOCAL.open(self._root / (name or "-"))
        raw = _RangeFile(lambda start, stop: self._fetch(name, start, stop), self._sizes[name])
        return cast(BinaryIO, io.BufferedReader(raw, _BLOCK))

    def read(self, path: Path, start: int, size: int) -> bytes:
        name = self._name(path)
        if name not in self._sizes:
            return LOCAL.read(self._root / (name or "-"), start, size)
        return self._fetch(name, start, start + size) if size else b""

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        return with_retries(f"{self._url}/{name}", lambda: self._ranges.fetch(name, start, stop))

    def _name(self, path: Path) -> str | None:
        """Return the name of a file below the place; None for any other: a table at a URL names no local file."""
        plain = os.path.relpath(os.path.normpath(path), self._root)
        return None if plain == ".." or plain.startswith("../") else plain


class _RangeFile(io.RawIOBase):
    """A file that is read by ranges."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size, self._place = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # a buffer has no type before Python 3.12
        stop = min(self._place + len(buffer), self._size)
        content = self._fetch(self._place, stop) if stop > self._place else b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class _RemoteSource:
    """A source that reads a stand-in."""

    def __init__(self, source: ImageSource, root: Path, url: str, left_out: list[Skipped]) -> None:
        self._source, self._root, self._url, self._left_out = source, root, url, left_out

    def units(self) -> Iterator[Unit]:
        """Yield the units of the source, and what of the place could not be listed."""
        with self._named():
            yield from self._source.units()
        yield from unit_beside(self._left_out)

    def identity(self, units: list[str]) -> Identity:
        return self._source.identity(units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        with self._named():
            yield from self._source.survey(unit)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        with self._named():
            return self._source.read(item, limit)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Show the URL in errors, where the stand-in is named."""
        try:
            yield
        except DataError as error:
            raise type(error)(str(error).replace(str(self._root), self._url)) from None


def open_remote(location: str) -> Remote:
    """List the place at a URL and make its stand-in, which this process removes when it ends.

    s3:// and gs:// are folders, or one table or tar; http(s):// is one .tar, .parquet or .arrow, because it has no
    listing. Raises DataError where the place cannot be read, or holds nothing.
    """
    scheme, url = scheme_of(location), expand(location)
    assert scheme is not None
    if scheme in ("http", "https"):
        return _one_file(url)
    suffix = Path(urlsplit(url).path).suffix.lower()
    if suffix in _WHOLE:
        return _one_file(url)
    folder, _, table = url.rstrip("/").rpartition("/") if suffix in _COPIED_TABLES else (url, "", "")
    cloud = CloudFolder(folder)
    url = redact(folder).rstrip("/")
    listing = with_retries(url, lambda: list(cloud.listing()), _FIRST_RETRIES)
    if not listing or (table and table not in dict(listing)):
        raise DataError(f"{redact(location)}: there is nothing of this name; correct --source")
    return _stand_in(cloud, url, table, listing)


def _one_file(url: str) -> Remote:
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if Path(name).suffix.lower() not in _WHOLE:
        raise DataError(
            f"{redact(url)}: {parts.scheme}:// has no listing of files; expected the URL of one "
            f"{', '.join(_WHOLE)}; copy anything else to a local folder"
        )
    name = unquote(name) if parts.scheme.startswith("http") else name
    place = urlunsplit(parts._replace(path=folder))
    ranges = RANGES[parts.scheme](place, RemoteOptions())
    size = with_retries(redact(url), lambda: ranges.size(name), _FIRST_RETRIES)
    return _stand_in(ranges, redact(place).rstrip("/"), name, [(name, size)])


def _stand_in(ranges: Ranges, url: str, table: str, listing: list[tuple[str, int]]) -> Remote:
    root = _temporary_folder() / (Path(urlsplit(url).path).name or urlsplit(url).netloc)
    root.mkdir()
    left_out, copied, sizes = list[Skipped](), list[tuple[str, int]](), dict[str, int]()
    for name, size in listing:
        wrong = _placed(root, name, size)
        if wrong is not None:
            left_out.append(Skipped(shown(name), wrong, beside=True))
        elif _is_copied(name, size):
            copied.append((name, size))
        else:
            sizes[name] = size
    with ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(lambda entry: _copy(ranges, url, root, *entry), copied))
    return Remote(
        root / table, RemoteFiles(ranges, url, root, sizes), lambda source: _RemoteSource(source, root, url, left_out)
    )


def _is_copied(name: str, size: int) -> bool:
    suffix = Path(name).suffix.lower()  # as the sources see it: os.path.splitext finds none in `...txt`
    return suffix in _COPIED_TABLES or _IDX in name or (suffix in CAPTION_SUFFIXES and size <= CAPTION_BYTES)


def _placed(root: Path, name: str, size: int) -> str | None:
    """Make a file of a name and size that takes no space; return why it cannot be."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "its name is not a plain relative path"
    path = root / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.truncate(size)
    except OSError as error:
        if error.errno in _NAMES:
            return f"its name cannot be that of a file ({error.strerror})"
        raise
    return None


def _copy(ranges: Ranges, url: str, root: Path, name: str, size: int) -> None:
    with (root / name).open("r+b") as file:
        for start in range(0, size, _PIECE):
            stop = min(start + _PIECE, size)
            file.write(_fetched(ranges, f"{url}/{name}", name, start, stop))


def _fetched(ranges: Ranges, where: str, name: str, start: int, stop: int) -> bytes:
    content = with_retries(where, lambda: ranges.fetch(name, start, stop))
    if len(content) != stop - start:
        raise DataError(f"{where}: changed since it was listed; run the same command again")
    return content


def _temporary_folder() -> Path:
    """Return a new folder that is removed when this process ends; those of killed processes are removed now."""
    prefix = f"sharpmoe-source-{socket.gethostname()}-"
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        process = old.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
