"""Every error that a user can fix. Imports nothing of this project, so that any module may raise them.

A message is one line: what is wrong, where, what was given, what is allowed, how to fix it.
"""

import errno
import os
import traceback
from pathlib import Path

_ROOT = f"{Path(__file__).resolve().parents[1]}{os.sep}"
# What the system calls an error -> what it means for the path that it names, and what to do.
_SYSTEM_FIXES: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("no such file or folder", "correct the path"),
    errno.EEXIST: ("exists already and is no folder", "choose another place"),
    errno.ENOTDIR: ("is a file, or below one, expected a folder", "choose another place"),
    errno.EISDIR: ("is a folder, expected a file", "add a file name, or choose another place"),
    errno.EACCES: ("permission denied", "choose another place, or change its permissions"),
    errno.EPERM: ("permission denied", "choose another place, or change its permissions"),
    errno.EROFS: ("this file system is read-only", "choose another place"),
    errno.ENOSPC: ("no space left on this disk", "free some, or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another place"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
}
_TORCH_FIXES: dict[str, str] = {  # words in a message of torch -> what to do
    "out of memory": "take fewer images at once (train.micro_batch, --batch-size, --chunk)",
    "invalid device string": "name a device such as cpu, cuda or cuda:0",
    "expected one of cpu": "name a device such as cpu, cuda or cuda:0",
    "invalid device ordinal": "name a device that this machine has",
    "no nvidia driver": "use --device cpu, or install the driver",
    "cuda error": "check the device with nvidia-smi; --debug shows the traceback",
    "enforce fail at": "check the folder that is written to and its disk",
}


class SharpMoEError(Exception):
    """Base of all errors that a user can fix; launchers print it as one line and exit with 2."""

    agreed = False  # whether every rank raises it, having exchanged it with the others
    lone = False  # whether this rank may be the only one that knows it, so that it prints it itself


class ConfigError(SharpMoEError):
    """A run file, an override or a DeepSpeed JSON holds something that cannot be run."""


class DataError(SharpMoEError):
    """Images, captions or shards are missing, damaged, or do not fit the run."""


class DamageError(DataError):
    """One sample, or a whole shard, is damaged or gone; data.max_bad_fraction says how many a run accepts."""


class CheckpointError(SharpMoEError):
    """A checkpoint or a weights file is missing, damaged, or belongs to another model or layout."""


class CheckpointDamageError(CheckpointError):
    """A checkpoint is proven to be damaged: a file is missing, has another size, or has another hash."""


class TrainingError(SharpMoEError):
    """A run cannot continue: a loss or a gradient is not finite."""


class OutsideError(SharpMoEError):
    """The system, torch or safetensors could not do what was needed: a disk, a device or a network failed."""


def outside_error(error: BaseException) -> SharpMoEError | None:
    """Return an error of the system, torch or safetensors as one line that says what to do; None for any other.

    Those come from a disk, a device, a file or the network, whatever the code does; a KeyError or TypeError is a bug.
    """
    if isinstance(error, MemoryError):
        return OutsideError(f"out of memory on this host{_raised_at(error)}; use less at once, or a larger host")
    if isinstance(error, OSError):
        return OutsideError(_system_line(error))
    if type(error).__name__ == "SafetensorError" and type(error).__module__.startswith("safetensors"):
        return OutsideError(
            f"safetensors: {first_line(error)}{_raised_at(error)}; check the file, its folder and its disk"
        )
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        said = first_line(error)
        hint = next((fix for word, fix in _TORCH_FIXES.items() if word in said.lower()), "--debug shows the traceback")
        return OutsideError(f"torch: {said}{_raised_at(error)}; {hint}")
    return None


def _system_line(error: OSError) -> str:
    place = error.filename2 or error.filename
    reason, fix = _SYSTEM_FIXES.get(error.errno or 0, (error.strerror or first_line(error), ""))
    if place is None:
        return f"{first_line(error)}{_raised_at(error)}" + (f"; {fix}" if fix else "; --debug shows the traceback")
    return f"{os.fsdecode(place) if isinstance(place, bytes) else place}: {reason}" + (f"; {fix}" if fix else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing; later lines are advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _raised_at(error: BaseException) -> str:
    """Return " (at FILE:LINE)" of the innermost line of this project, or "" where there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    ours = [(file, line) for file, line in frames if file.startswith(_ROOT) and "site-packages" not in file]
    return f" (at {ours[-1][0].removeprefix(_ROOT)}:{ours[-1][1]})" if ours else ""
