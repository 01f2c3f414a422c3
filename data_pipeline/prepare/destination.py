"""Where a preparation writes: a local folder, or a bucket, where every file appears whole and the index last.

For a bucket the shards are made in a folder in TMPDIR, one at a time, and what is at the URL is seen there: small files
as they are, tars as files of the same size that take no space. So a killed run goes on as it does in a local folder.
All ranks of a run share that folder; on several machines TMPDIR has to be on a disk that all share. Two runs with
other recipes are refused, by recipe.json at the URL; two with the same recipe would write the same bytes.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, TextIO, TypeVar

from data_pipeline.index import INDEX_FILE
from data_pipeline.prepare.finish import FOLDER_FILES, WORK_FOLDER
from data_pipeline.prepare.recipe import RECIPE_FILE
from data_pipeline.safety import expand, redact, scheme_of
from data_pipeline.store.cloud import CloudFolder
from data_pipeline.store.ranges import with_retries
from sharpmoe.durable import check_folder, write_atomically
from sharpmoe.errors import DamageError, DataError

_WRITABLE = ("gs", "s3")
_PROBE = ".probe"
_FIRST_RETRIES = 1  # of the first request: a place that cannot be used is said soon
_PIECE = 32 << 20  # bytes of a file that are copied at a time
_T = TypeVar("_T")


class Publish(Protocol):
    """Shows a file of the folder at its destination; what is published first is there first."""

    def __call__(self, path: Path, content: bytes | None = None) -> object:
        """Publish the file at `path`, or `content` under its name before the file is written."""
        ...


class Destination(NamedTuple):
    """A folder to prepare into."""

    folder: Path
    publish: Publish
    shown: Callable[[str], str]  # a message, with the URL in the place of the folder


def publish_nothing(path: Path, content: bytes | None = None) -> None:
    """Do nothing: a local folder is its own destination."""


def check_destination(out: str) -> None:
    """Raise DataError or OSError where `--out` cannot be written to; a bucket is tried with an empty object."""
    if "://" not in out:
        check_folder(Path(out))
        return
    _Bucket(out).check()


@contextmanager
def open_destination(out: str) -> Iterator[Destination]:
    """Yield what to prepare into: a folder, or the working folder of a URL of s3:// or gs://.

    Raises DataError for other URLs, and where the bucket cannot be read.
    """
    if "://" not in out:
        yield Destination(Path(out), publish_nothing, lambda text: text)
        return
    bucket = _Bucket(out)
    folder = _working_folder(bucket.url)
    try:
        with _shared(folder, bucket) as uploads:
            yield Destination(folder, uploads.publish, lambda text: text.replace(str(folder), bucket.url))
            uploads.finish()
    except DataError as error:
        raise type(error)(str(error).replace(str(folder), bucket.url)) from None


class _Bucket:
    """A prefix of a bucket, asked again where an error may pass."""

    def __init__(self, out: str) -> None:
        if scheme_of(out) not in _WRITABLE:
            raise DataError(f"{redact(out)}: --out takes a folder, or a URL of {', '.join(_WRITABLE)}")
        self._cloud = CloudFolder(expand(out))
        self.url = redact(expand(out)).removesuffix("/")

    def ask(self, name: str, act: Callable[[CloudFolder], _T], retries: int = 6) -> _T:
        return with_retries(f"{self.url}/{name}".removesuffix("/"), lambda: act(self._cloud), retries)

    def check(self) -> None:
        """Write and remove an empty object."""
        self.ask("", lambda cloud: cloud.put(_PROBE, b""), _FIRST_RETRIES)
        with suppress(DamageError):  # another rank has removed it
            self.ask("", lambda cloud: cloud.remove(_PROBE), _FIRST_RETRIES)

    def listing(self) -> dict[str, int]:
        return dict(self.ask("", lambda cloud: list(cloud.listing()), _FIRST_RETRIES))

    def small(self, name: str) -> bytes | None:
        """Return a file of the top folder, None where it does not exist."""
        try:
            return self.read(name, self.ask(name, lambda cloud: cloud.size(name)))
        except DamageError:
            return None

    def read(self, name: str, size: int) -> bytes:
        def piece(start: int) -> bytes:
            return self.ask(name, lambda cloud: cloud.fetch(name, start, min(start + _PIECE, size)))

        return b"".join(piece(start) for start in range(0, size, _PIECE))

    def write(self, name: str, content: Path | bytes) -> None:
        self.ask(name, lambda cloud: cloud.put(name, content))

    def remove(self, name: str) -> None:
        with suppress(DamageError):  # another rank has removed it
            self.ask(name, lambda cloud: cloud.remove(name))


class _Uploads:
    """The working folder of a bucket."""

    def __init__(self, folder: Path, bucket: _Bucket) -> None:
        self._folder, self._bucket = folder, bucket

    def begin(self) -> None:
        """Show in the folder what is at the URL, after a check that it can be written to."""
        listing = self._bucket.listing()
        if INDEX_FILE not in listing:
            self._bucket.check()
        for name, size in listing.items():
            path = self._folder / name
            if not _is_ours(name, listing):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".tar":
                _hollow(path, size)
            else:
                write_atomically(path, self._bucket.read(name, size))

    def publish(self, path: Path, content: bytes | None = None) -> None:
        """Upload a file; a tar then takes no more space."""
        name = path.relative_to(self._folder).as_posix()
        if path.name == RECIPE_FILE:
            self._claim(path)
            return
        if path.suffix == ".tar":
            self._claim(self._folder / RECIPE_FILE)
        self._bucket.write(name, path if content is None else content)
        if path.suffix == ".tar":
            _hollow(path, path.stat().st_size)

    def _claim(self, recipe: Path) -> None:
        """Write the recipe at the URL, unless it is there. Raises DataError where another run has written its own."""
        found, mine = self._bucket.small(RECIPE_FILE), recipe.read_bytes()
        if found is None:
            self._bucket.write(RECIPE_FILE, mine)
            found = mine
        if found != mine:
            raise DataError(f"{self._folder}: another run prepares other data there; choose another --out")

    def finish(self) -> None:
        """Remove what only the preparation needed, where the index is written."""
        names = self._bucket.listing()
        for name in names if INDEX_FILE in names else ():
            if name.startswith(f"{WORK_FOLDER}/"):
                self._bucket.remove(name)


def _is_ours(name: str, listing: Mapping[str, int]) -> bool:
    """Return whether an object is a file of a set of shards, or of one that is being prepared.

    Others that lie there are not copied: they may be of any size.
    """
    path = PurePosixPath(name)
    if path.parts[0] == WORK_FOLDER:
        return not {"", ".", ".."} & set(name.split("/"))
    if len(path.parts) > 1:
        return False
    return name in FOLDER_FILES or path.suffix == ".tar" or f"{name.removesuffix('.json')}.tar" in listing


def _hollow(path: Path, size: int) -> None:
    """Make a file of a size that takes no space."""

    def write(draft: Path) -> None:
        with draft.open("wb") as file:
            file.truncate(size)

    write_atomically(path, write)


def _working_folder(url: str) -> Path:
    """Return the folder of a URL: the same for all ranks, and for the run that goes on after a kill."""
    user = hashlib.sha256(f"{os.getuid()} {url}".encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"sharpmoe-prepare-{user}"


@contextmanager
def _shared(folder: Path, bucket: _Bucket) -> Iterator[_Uploads]:
    """Share the working folder with the other ranks: the first one makes it, the last one removes it."""
    uploads = _Uploads(folder, bucket)
    try:
        file = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot be written to ({error.strerror}); name a folder with TMPDIR"
        ) from None
    with file:
        if _alone(file):
            shutil.rmtree(folder, ignore_errors=True)
            uploads.begin()
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            yield uploads
        finally:
            if _alone(file):
                shutil.rmtree(folder, ignore_errors=True)


def _alone(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
