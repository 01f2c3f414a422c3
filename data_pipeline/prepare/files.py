"""Files that are always absent, old or complete, whoever is killed while writing them."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharpmoe.errors import DataError

_TEMPORARY = ".tmp"


def write_atomic(path: Path, content: bytes = b"", writer: Callable[[Path], object] | None = None) -> None:
    """Write beside `path`, flush to disk, rename: `path` is always absent, old or complete."""
    temporary = _written(path, content, writer)
    temporary.replace(path)
    _flush_folder(path.parent)


def publish(path: Path, content: bytes = b"", writer: Callable[[Path], object] | None = None) -> None:
    """Like `write_atomic`, but the first of several writers wins: a file that is there stays as it is."""
    if path.exists():
        return
    temporary = _written(path, content, writer)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        temporary.replace(path)
    temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _written(path: Path, content: bytes, writer: Callable[[Path], object] | None) -> Path:
    """A complete temporary file, with a name that no other process uses."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{_TEMPORARY}")
    if writer is None:
        temporary.write_bytes(content)
    else:
        writer(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    return temporary


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes have left; nobody may be writing into the folder."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Make the folder and hold it: one process alone, or (`shared`) the ranks of one run.

    The lock spares work and tells of mistakes; nothing breaks without it, so file systems that have none will do.
    Raises DataError where another process holds the folder, or where it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this folder; wait for it") from None
        except OSError:
            pass
        yield


def read_json(path: Path) -> dict[str, Any] | None:
    """An object, None where there is no such file; DataError where it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path}: damaged; delete it and prepare again") from None
    return content


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
