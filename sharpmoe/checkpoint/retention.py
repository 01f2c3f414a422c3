"""The folder of a run's checkpoints: names, the newest, which ones stay, room on the disk. No communication."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharpmoe import durable
from sharpmoe.checkpoint.manifest import MANIFEST
from sharpmoe.config import CheckpointConfig
from sharpmoe.errors import CheckpointError, first_line
from sharpmoe.log_file import LOG_FILE, read_log

LATEST = "latest"
BEST = "best"  # names the checkpoint that `checkpoint.keep_best` keeps
_MEASURED = "validation/flow"  # in the log: held-out flow loss of the averaged weights
_SLACK = 1.02  # of the bytes of tensors: headers, manifests, blocks that are not full


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn an error of the operating system in the body into a CheckpointError that names `place`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise CheckpointError(f"{place}: cannot be written ({reason}); free space or change output") from error


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after `step` optimizer steps."""
    return f"step{step:08d}"


def latest(root: Path) -> Path | None:
    """Return the checkpoint that `latest` names, whether it exists or not; None where the file names none."""
    return _named(root, LATEST)


def kept_best(root: Path) -> Path | None:
    """Return the checkpoint that `best` names, whether it exists or not; None where the file names none."""
    return _named(root, BEST)


def _named(root: Path, pointer: str) -> Path | None:
    try:
        name = (root / pointer).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return root / name if _is_name(name) else None


def newest_first(root: Path) -> list[Path]:
    """Return all checkpoint folders: `latest` first, then by the time in their manifest, those without one last.

    The times of files do not count: a copy has others. A manifest that does not tell its time has that of the
    checkpoint before it in the order of steps.
    """
    first, order, time = latest(root), [], 0.0
    found = [path for path in root.glob("step*") if path.is_dir() and _is_name(path.name)]
    for path in sorted(found, key=_step_of):
        has_manifest = (path / MANIFEST).is_file()
        time = _time_of(path / MANIFEST) or time
        order.append(((path == first, has_manifest, time if has_manifest else 0.0, _step_of(path)), path))
    return [path for _, path in sorted(order, reverse=True)]


def drop_old(root: Path, newest: Path, config: CheckpointConfig) -> None:
    """Remove all but the `keep` written last, those of every `keep_every` steps and the best; also interrupted saves.

    The best is that of `keep_best`, which the file `best` names. Folders without a manifest stay: a save did not write
    them.
    """
    ours = [path for path in newest_first(root) if (path / MANIFEST).is_file()]
    kept = [newest, *(path for path in ours if path != newest)][: config.keep]
    best = _best(root, ours) if config.keep_best else None
    if best is not None:
        kept.append(best)
        durable.write_atomically(root / BEST, best.name)
    else:
        (root / BEST).unlink(missing_ok=True)
    for path in ours:
        if path not in kept and not is_milestone(path, config):
            durable.remove_folder(path)
    for path in root.glob(".step*"):
        durable.remove_folder(path)
    durable.remove_drafts(root)


def _best(root: Path, folders: list[Path]) -> Path | None:
    """Return the checkpoint after whose step the lowest held-out flow loss is logged, the first of equal ones.

    Where none was measured, as after the log was lost, it is the best so far, if there is one. The log is that of the
    run folder; of steps that were done twice it counts what the run continued from.
    """
    log, before = root.parent / LOG_FILE, kept_best(root)
    losses = read_log(log).get(_MEASURED, {}) if log.is_file() else {}
    measured = [path for path in sorted(folders, key=_step_of) if math.isfinite(losses.get(_step_of(path), math.nan))]
    known = before if before in folders else None
    return min(measured, key=lambda path: losses[_step_of(path)], default=known)


def is_milestone(folder: Path, config: CheckpointConfig) -> bool:
    """Return whether `keep_every` keeps a checkpoint for good."""
    return config.keep_every > 0 and _is_name(folder.name) and _step_of(folder) % config.keep_every == 0


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither counted nor tried again; return the path. Raises OSError."""
    place, count = folder.with_name(f"damaged.{folder.name}"), 1
    while place.exists():
        count += 1
        place = folder.with_name(f"damaged.{folder.name}.{count}")
    folder.rename(place)
    return place


def check_room(root: Path, count: int, size: int) -> None:
    """Raise CheckpointError where the disk of `root` lacks room for `count` checkpoints of `size` bytes of tensors.

    `root` need not exist. File systems that do not tell their size, some of the network, are believed to have room.
    """
    free, need = free_bytes(root), int(size * _SLACK)
    if free is not None and free < count * need:
        several = f", and {count} are still to come" if count > 1 else ""
        raise CheckpointError(
            f"{root}: a checkpoint takes {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free{several}; free space, lower "
            "checkpoint.keep, or change output"
        )


def free_bytes(root: Path) -> int | None:
    """Return the free bytes of the disk that a folder is on, or would be on; None where the system does not know."""
    found = shutil.disk_usage(next(place for place in (root, *root.absolute().parents) if place.exists()))
    return found.free if found.total else None


def _is_name(name: str) -> bool:
    return name.startswith("step") and name.removeprefix("step").isdigit()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step"))


def _time_of(manifest: Path) -> float:
    """Return when a checkpoint was written as its manifest says, 0 where it does not, or cannot be read."""
    try:
        return float(json.loads(manifest.read_bytes())["saved"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
