"""Files and folders that survive a crash: written completely or not at all, flushed to the disk, then named.

The one home of atomic and durable writes, for `sharpmoe` and `data_pipeline` alike. Contents and names are flushed
separately: a new file survives a power failure only when its folder has been flushed too. Everything here raises
OSError, unless it says otherwise; nothing communicates between ranks.
"""

import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Content = bytes | str | Callable[[Path], object]  # what a file holds, or a function that writes the file at a path

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors reports an error of the system
_DRAFT = ".tmp"  # suffix of files that are being written
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_draft(path: Path) -> Iterator[Path]:
    """Yield the path of a draft for the body to write; then flush it and rename it to `path`.

    `path` is always absent, old or complete. An exception in the body removes the draft and leaves `path` as it was.
    The draft's name contains host and process, so several processes may write the same file; the last one wins. An
    OSError names `path`; a folder that cannot be written to, or that stands at `path`, raises before the body.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_unwritable(path)
    draft = _draft_of(path)
    try:
        yield draft
        flush_file(draft)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        # A write to an open file says no name; an error without a number is no error of the system and keeps its text.
        if error.errno is not None and error.filename in (None, str(draft)):
            error.filename = str(path)
        raise
    except Exception as error:
        draft.unlink(missing_ok=True)
        number = _RUST_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _refuse_unwritable(path: Path) -> None:
    """Raise OSError where a file cannot be put at `path`: other libraries' errors do not say which path they mean."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _no_access(path.parent)


def check_folder(folder: Path) -> None:
    """Raise OSError where a folder cannot be made or written to, without making it: before hours of work for it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if not takes_files(existing):
        raise _no_access(existing)


def _no_access(folder: Path) -> OSError:
    """Return why a folder takes no files: rights, or a file system that is mounted for reading only."""
    number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
    return OSError(number, os.strerror(number), str(folder))  # of EACCES a PermissionError


def takes_files(folder: Path) -> bool:
    """Whether files can be made in a folder that exists.

    Rights do not tell root of a file system that holds no files, such as /proc: it says that it has no room at all, as
    some network file systems do, so that there a folder is made and removed.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    if shutil.disk_usage(folder).total:
        return True
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


def write_atomically(path: Path, content: Content) -> None:
    """Replace a file's content: after a crash the file is absent, old or complete, never partly written."""
    with atomic_draft(path) as draft:
        _write(draft, content)


def publish_once(path: Path, content: Content) -> None:
    """Write a file atomically unless it exists: the first of several writers wins, on any host."""
    if path.exists():
        return
    draft = _draft_of(path)
    try:
        _write(draft, content)
        flush_file(draft)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _draft_of(path: Path) -> Path:
    """Return a name of this thread's own: several may write one file at a time."""
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}"
    return path.with_name(f".{path.name}.{writer}{_DRAFT}")


def _write(path: Path, content: Content) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Remove the drafts that killed processes left of the file `name`, or of all files; nobody may be writing them."""
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*{_DRAFT}"):
        path.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    _flush(path)


def _flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    _flush(folder)


def flush_tree(folder: Path) -> None:
    """Wait until the names in a folder and in all folders below it are on the disk."""
    for each in {folder, *(path.parent for path in folder.rglob("*"))}:
        _flush_folder(each)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fresh_folder(folder: Path) -> None:
    """Make an empty folder, removing whatever an interrupted save left under its name."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def publish_folder(draft: Path, final: Path) -> None:
    """Rename a finished folder to `final`, replacing a folder of that name: the two are exchanged in one system call.

    On file systems that cannot exchange (some network ones) there is a moment between two renames without `final`.
    """
    if final.exists():
        if not _exchange(draft, final):
            aside = draft.with_name(f"{draft.name}.former")
            final.rename(aside)
            draft.rename(final)
            draft = aside
        _flush_folder(final.parent)
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.rename(final)
        _flush_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: after a crash it is complete or has a hidden name, never incomplete under its own name.

    A folder that cannot be removed stays, without an error: what has just been written is not affected.
    """
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.dropped")
    with suppress(OSError):
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (renameat2, Linux); return False where the system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return swap is not None and swap(*paths, _RENAME_EXCHANGE) == 0
