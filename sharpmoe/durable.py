"""Changes of the disk that outlast a crash, one at a time. Everything that a save does to files goes through here.

Names are flushed apart from contents: a file is safe when its folder is flushed too.
"""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from sharpmoe.errors import CheckpointError

T = TypeVar("T")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def writing(place: Path, write: Callable[[], T]) -> T:
    """Call `write`; an error of the operating system becomes a CheckpointError that names `place`."""
    try:
        return write()
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise CheckpointError(f"{place}: cannot be written ({reason}); free space or change output") from error


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; what a save that was cut off left under its name goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_text(path: Path, text: str) -> None:
    """Write a file and flush it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Give a file another content: a crash leaves the old or the new one."""
    draft = path.with_name(f".{path.name}.partial")
    write_text(draft, text)
    os.replace(draft, path)
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    _flush(path)


def flush_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    _flush(folder)


def flush_tree(folder: Path) -> None:
    """Wait until the names in a folder and all below it are on the disk."""
    for each in {folder, *(path.parent for path in folder.rglob("*"))}:
        flush_folder(each)


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_folder(draft: Path, final: Path) -> None:
    """Give a finished folder its name. One that has the name is exchanged for it in one instant, then removed.

    File systems that cannot exchange (some network ones) have no folder of that name between two renames.
    """
    if final.exists():
        if not _exchange(draft, final):
            aside = draft.with_name(f"{draft.name}.former")
            final.rename(aside)
            draft.rename(final)
            draft = aside
        flush_folder(final.parent)
        shutil.rmtree(draft, ignore_errors=True)
    else:
        draft.rename(final)
        flush_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a crash leaves it whole or under a hidden name, never in part under its own.

    One that cannot be removed stays: that is no error of what has just been written.
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
    """Swap two names in one instant (renameat2, Linux); False where that cannot be had."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
