"""manifest.json: what a checkpoint is, with size and sha256 of every file; manifest.sha256 is the hash of the manifest.

`sha256sum -c manifest.sha256` in a checkpoint's folder checks the manifest by hand. Nothing here communicates.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from sharpmoe import durable
from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.errors import CheckpointDamageError, CheckpointError

MANIFEST = "manifest.json"
_SEAL = "manifest.sha256"
_SCHEMA = 2
_FIX = "name an undamaged checkpoint with --checkpoint.resume"
_OTHER = "or name another checkpoint with --checkpoint.resume"


class Watch(NamedTuple):
    """Recent gradient norms, from which spikes are recognised (train.guard): the same on every rank."""

    average: float = 0.0  # moving average of the gradient norm
    seen: int = 0  # norms in it, at most guard.spike_window
    skipped: int = 0  # consecutive steps skipped


# (MoE layers, E) scores that experts accept in the next step; () where the steps of a trajectory are no pool.
Cutoffs = tuple[tuple[float, ...], ...]


class Progress(NamedTuple):
    """How far a run has come."""

    step: int  # optimizer steps done
    samples: int  # samples consumed, over all ranks: the position in the data order
    streams: tuple[int, ...] = ()  # of every bucket of every source, where there are several
    watch: Watch = Watch()
    cutoffs: Cutoffs = ()


class RunIdentity(NamedTuple):
    """What must agree between a checkpoint and the run that resumes it, beside the architecture.

    The number of ranks, ep_size and ZeRO stage may differ; they are among the settings.
    """

    precision: str
    optimizer: str
    seed: int  # keys the data order and all draws
    shards: str  # fingerprint of the training data

    @classmethod
    def of(cls, run: RunConfig, fingerprint: str) -> "RunIdentity":
        """Return the identity of a run on training shards with this fingerprint."""
        return cls(run.train.precision, run.optim.name, run.seed, fingerprint)


class FileEntry(NamedTuple):
    """Size and hash of a file."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    folder: Path
    progress: Progress
    identity: RunIdentity  # "layout" in the file
    model: ModelConfig
    settings: dict[str, Any]  # dotted key -> value: resolved configuration, engine keys, versions of the code
    files: dict[str, FileEntry]  # by relative path
    saved: float = 0.0  # when it was written, in seconds since 1970; 0: by a version that did not say so

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return whether a folder holds a checkpoint, complete or damaged."""
        return (folder / MANIFEST).is_file()


def write_manifest(manifest: Manifest) -> None:
    """Write and flush manifest.json and manifest.sha256 in `manifest.folder`. Raises OSError."""
    content = {
        "schema": _SCHEMA,
        "saved": manifest.saved,
        "progress": manifest.progress._asdict() | {"watch": manifest.progress.watch._asdict()},
        "layout": manifest.identity._asdict(),
        "model": manifest.model.model_dump(mode="json"),
        "settings": manifest.settings,
        "files": {name: entry._asdict() for name, entry in sorted(manifest.files.items())},
    }
    text = json.dumps(content, indent=1)
    for name, each in ((MANIFEST, text), (_SEAL, _seal(text.encode()))):
        (manifest.folder / name).write_text(each, encoding="utf-8")
        durable.flush_file(manifest.folder / name)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises CheckpointDamageError where it is missing or damaged, CheckpointError where it cannot be read or understood.
    """
    path = folder / MANIFEST
    try:
        content, seal = path.read_bytes(), (folder / _SEAL).read_bytes()
    except OSError as error:
        raise _unreadable(Path(error.filename), error) from None
    if seal != _seal(content).encode():
        raise CheckpointDamageError(f"{path}: damaged ({_SEAL} differs); {_FIX}")
    try:
        return _parse(folder, json.loads(content))
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path}: not understood ({reason}): another version wrote it; use that, {_OTHER}"
        ) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error of a file that cannot be read. Only one that does not exist is damage: others may come back."""
    if isinstance(error, FileNotFoundError):
        return CheckpointDamageError(f"{path}: missing; {_FIX}")
    return CheckpointError(f"{path}: cannot be read ({error.strerror}); correct that and start again, {_OTHER}")


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    if content["schema"] != _SCHEMA:
        found = content["schema"]
        raise CheckpointError(
            f"{folder / MANIFEST}: schema {found!r}, expected {_SCHEMA}: another version wrote it; use that, {_OTHER}"
        )
    progress = content["progress"]
    tuples = {
        "streams": tuple(progress["streams"]),
        "watch": Watch(**progress["watch"]),
        "cutoffs": tuple(tuple(layer) for layer in progress.get("cutoffs", ())),
    }
    return Manifest(
        folder=folder,
        progress=Progress(**progress | tuples),
        identity=RunIdentity(**content["layout"]),
        model=ModelConfig(**content["model"]),
        settings=content["settings"],
        files={name: FileEntry(**entry) for name, entry in content["files"].items()},
        saved=float(content.get("saved", 0.0)),
    )


def _seal(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n"


def file_entry(path: Path) -> FileEntry:
    """Return size and hash of a file. Raises OSError."""
    return FileEntry(path.stat().st_size, durable.sha256_of(path))


def verify_checkpoint(folder: Path) -> Manifest:
    """Read a manifest and verify all files of the checkpoint. Raises CheckpointError."""
    manifest = read_manifest(folder)
    verify_files(manifest, manifest.files)
    return manifest


def verify_files(manifest: Manifest, names: Iterable[str], *, sizes_only: bool = False) -> None:
    """Compare size and sha256 of these files with the manifest; raise CheckpointDamageError on the first difference.

    Raises CheckpointError where a file cannot be read, and for one in the folder that the manifest does not list: it
    might be read too, but says nothing about the others. sizes_only: reads no file.
    """
    for path in sorted(manifest.folder.rglob("*")):
        name = str(path.relative_to(manifest.folder))
        if path.is_file() and name not in (*manifest.files, MANIFEST, _SEAL):
            raise CheckpointError(f"{path}: not part of the checkpoint; remove it, {_OTHER}")
    for name in names:
        path, known = manifest.folder / name, manifest.files[name]
        try:
            is_same = path.stat().st_size == known.size
            found = None if not is_same else known if sizes_only else file_entry(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        if found is None:
            raise CheckpointDamageError(f"{path}: damaged (its size differs); {_FIX}")
        if found != known:
            raise CheckpointDamageError(f"{path}: damaged (its sha256 differs); {_FIX}")


def split_files(manifest: Manifest, count: int) -> Sequence[list[str]]:
    """Divide a checkpoint's files among `count` readers, about the same number of bytes each."""
    lists: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name)):
        least = loads.index(min(loads))
        lists[least].append(name)
        loads[least] += manifest.files[name].size + 1
    return lists
