"""manifest.json of a checkpoint: what it is, and size and sha256 of every file. manifest.sha256 vouches for it in turn.

`sha256sum -c manifest.sha256` in a checkpoint's folder checks the manifest by hand. Nothing here communicates.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from sharpmoe import durable
from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.train.guard import Watch

SCHEMA = 2
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_MEND = "name a sound checkpoint with --checkpoint.resume"


class Progress(NamedTuple):
    """How far a run is."""

    step: int  # optimizer steps done
    samples: int  # samples consumed, over all ranks: the place in the data order
    streams: tuple[int, ...] = ()  # of every bucket of every source, where there are several
    watch: Watch = Watch()  # of the gradient norm


class Layout(NamedTuple):
    """What must agree between a checkpoint and the run that goes on from it, beside the architecture.

    Ranks, ep_size and ZeRO stage need not; they are among the settings.
    """

    precision: str
    optimizer: str
    seed: int  # keys the data order and all draws
    shards: str  # fingerprint of the training data


class Entry(NamedTuple):
    """What a manifest says about a file."""

    size: int  # bytes
    sha256: str


class Manifest(NamedTuple):
    """manifest.json of a checkpoint, read and checked."""

    folder: Path
    progress: Progress
    layout: Layout
    model: ModelConfig
    settings: dict[str, Any]  # dotted key -> value: resolved configuration, engine keys, versions of the code
    files: dict[str, Entry]  # relative path -> size and hash


def write(manifest: Manifest) -> None:
    """Write and flush manifest.json and manifest.sha256 of `manifest.folder`. Raises OSError."""
    content = {
        "schema": SCHEMA,
        "progress": manifest.progress._asdict() | {"watch": manifest.progress.watch._asdict()},
        "layout": manifest.layout._asdict(),
        "model": manifest.model.model_dump(mode="json"),
        "settings": manifest.settings,
        "files": {name: entry._asdict() for name, entry in sorted(manifest.files.items())},
    }
    text = json.dumps(content, indent=1)
    for name, each in ((MANIFEST, text), (SEAL, _seal(text.encode()))):
        (manifest.folder / name).write_text(each, encoding="utf-8")
        durable.flush_file(manifest.folder / name)


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder. Raises CheckpointError where it is missing or not as it was written."""
    path = folder / MANIFEST
    try:
        content, seal = path.read_bytes(), (folder / SEAL).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); {_MEND}") from None
    if seal != _seal(content).encode():
        raise CheckpointError(f"{path}: damaged ({SEAL} differs); {_MEND}")
    try:
        return _parse(folder, json.loads(content))
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path}: not understood ({reason}); {_MEND}") from None


def _parse(folder: Path, content: dict[str, Any]) -> Manifest:
    if content["schema"] != SCHEMA:
        found = content["schema"]
        raise CheckpointError(f"{folder / MANIFEST}: schema {found!r}, expected {SCHEMA}: another version wrote it")
    progress = content["progress"]
    return Manifest(
        folder,
        Progress(**progress | {"streams": tuple(progress["streams"]), "watch": Watch(**progress["watch"])}),
        Layout(**content["layout"]),
        ModelConfig(**content["model"]),
        content["settings"],
        {name: Entry(**entry) for name, entry in content["files"].items()},
    )


def _seal(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n"


def entry(path: Path) -> Entry:
    """Size and hash of a file. Raises OSError."""
    return Entry(path.stat().st_size, durable.sha256_of(path))


def check_files(manifest: Manifest, names: Iterable[str]) -> None:
    """Compare size and sha256 of some of a checkpoint's files; CheckpointError names the first that differs."""
    for name in names:
        path, known = manifest.folder / name, manifest.files[name]
        try:
            found = entry(path) if path.stat().st_size == known.size else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from None
        if found is None:
            raise CheckpointError(f"{path}: damaged (its size differs); {_MEND}")
        if found != known:
            raise CheckpointError(f"{path}: damaged (its sha256 differs); {_MEND}")


def check_strangers(manifest: Manifest) -> None:
    """Raise CheckpointError on a file that the manifest does not know: it might be read as well."""
    for path in sorted(manifest.folder.rglob("*")):
        name = str(path.relative_to(manifest.folder))
        if path.is_file() and name not in (*manifest.files, MANIFEST, SEAL):
            raise CheckpointError(f"{path}: not part of the checkpoint; remove it, or {_MEND}")


def verify(folder: Path) -> Manifest:
    """Read a manifest and check everything that it vouches for. Raises CheckpointError."""
    manifest = read(folder)
    check_strangers(manifest)
    check_files(manifest, manifest.files)
    return manifest


def shares(manifest: Manifest, count: int) -> Sequence[list[str]]:
    """Deal a checkpoint's files to `count` readers, about as many bytes to each."""
    dealt: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += manifest.files[name].size + 1
    return dealt
