"""Checkpoints that are either whole or not there.

A checkpoint is written to a hidden folder, flushed, renamed to step<N>, and only then does `latest` name it. It holds
the engine's shards, the EMA's shards, both as consolidated weights (live.safetensors, ema.safetensors: float32,
readable without DeepSpeed), and meta.json, which vouches for every other file.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError

from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.dit import DiT
from sharpmoe.model.pretrained import check_architecture, save_weights
from sharpmoe.parallel.engine import Engine
from sharpmoe.parallel.launch import World, gather_objects, together
from sharpmoe.train.ema import ShardEma

SCHEMA = 1
META, LATEST = "meta.json", "latest"
_ENGINE = "engine"


class Progress(NamedTuple):
    """How far a run is."""

    step: int  # optimizer steps done
    samples: int  # samples consumed, over all ranks: the place in the data order
    streams: tuple[int, ...] = ()  # of every bucket of every source; empty in older checkpoints, which had one


class Layout(NamedTuple):
    """What must agree between a checkpoint and the run that goes on from it, beside the architecture."""

    world: int  # ranks
    stage: int  # ZeRO stage
    precision: str
    optimizer: str
    seed: int  # keys the data order and all draws
    shards: str  # fingerprint of the training data


# How to mend a difference in each field of Layout.
_MEND = {
    "world": "start as many ranks, or begin a run from its live.safetensors with checkpoint.init",
    "stage": "use the DeepSpeed file of that stage, or begin a run from its live.safetensors with checkpoint.init",
    "precision": "set train.precision accordingly, or begin a run from its live.safetensors with checkpoint.init",
    "optimizer": "set optim.name accordingly, or begin a run from its live.safetensors with checkpoint.init",
    "seed": "set seed accordingly, or begin a run from its live.safetensors with checkpoint.init",
    "shards": "point data.shards at the shards it was trained on, or begin a run with checkpoint.init",
}


class Saved(NamedTuple):
    """meta.json of a checkpoint, read and checked."""

    folder: Path
    progress: Progress
    layout: Layout
    model: ModelConfig
    files: dict[str, tuple[int, str]]  # relative path -> (bytes, sha256)


def layout_of(run: RunConfig, stage: int, world: int, fingerprint: str) -> Layout:
    """Layout of a run; `stage` is ZeRO's, `fingerprint` that of the training shards."""
    return Layout(world, stage, run.train.precision, run.optim.name, run.seed, fingerprint)


def resume_folder(root: Path, resume: str) -> Path | None:
    """Checkpoint folder that checkpoint.resume names, None to start from the beginning. No communication.

    Raises CheckpointError where it does not exist, and where `none` would mix a new run into another's checkpoints.
    """
    if resume == "auto":
        pointer = root / LATEST
        return root / pointer.read_text().strip() if pointer.is_file() else None
    if resume == "none":
        if (root / LATEST).exists():
            raise CheckpointError(
                f"{root}: holds checkpoints, which checkpoint.resume: none would mix with a new run's; "
                "set another name, or move them away"
            )
        return None
    folder = Path(resume)
    if (folder / LATEST).is_file():
        return folder / (folder / LATEST).read_text().strip()
    if not (folder / META).is_file():
        raise CheckpointError(
            f"checkpoint.resume: {folder} is no checkpoint (it has no {META}); name a step folder, auto, or none"
        )
    return folder


def read_meta(folder: Path) -> Saved:
    """Read meta.json of a checkpoint folder. Raises CheckpointError; no communication."""
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: schema {meta.get('schema')!r}, expected {SCHEMA}: another version wrote it")
        return Saved(
            folder,
            _progress(**meta["progress"]),
            Layout(**meta["layout"]),
            ModelConfig(**meta["model"]),
            {name: (size, digest) for name, (size, digest) in meta["files"].items()},
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; name a sound checkpoint with --checkpoint.resume") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, ValidationError):
        raise CheckpointError(f"{path}: damaged; name a sound checkpoint with --checkpoint.resume") from None


def _progress(step: int, samples: int, streams: Sequence[int] = ()) -> Progress:
    return Progress(step, samples, tuple(streams))


def check_fits(saved: Saved, model: ModelConfig, layout: Layout) -> None:
    """Raise CheckpointError on the first difference between a checkpoint and the run. No communication."""
    check_architecture(saved.model, model, str(saved.folder))
    if saved.model.saliency_router != model.saliency_router:
        raise CheckpointError(
            f"{saved.folder}: model.saliency_router is {saved.model.saliency_router} there, {model.saliency_router} in "
            "the run; begin a run from its live.safetensors with checkpoint.init"
        )
    for field, there, here in zip(Layout._fields, saved.layout, layout, strict=True):
        if there != here:
            raise CheckpointError(f"{saved.folder}: {field} is {there!r} there, {here!r} in the run; {_MEND[field]}")


def check_files(saved: Saved, names: list[str]) -> None:
    """Compare size and sha256 of some of a checkpoint's files; CheckpointError names the first that differs."""
    for name in names:
        path = saved.folder / name
        size, digest = saved.files.get(name, (-1, ""))
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: missing or cut short; name a sound checkpoint with --checkpoint.resume")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: damaged (sha256 differs); name a sound checkpoint with --checkpoint.resume")


def load(saved: Saved, engine: Engine, ema: ShardEma) -> None:
    """Bring engine and EMA to the state of a checkpoint that fits (`check_fits`). Every rank calls it.

    Communicates. Raises CheckpointError on every rank where a file that any rank needs is damaged, before the engine
    reads one.
    """
    world = engine.world
    with together(world):
        check_files(saved, _files_of_rank(list(saved.files), world))
    engine.load(saved.folder / _ENGINE)
    ema.load(saved.folder / _ema_name(world.rank))


class Contents(NamedTuple):
    """What a checkpoint is made of."""

    engine: Engine
    ema: ShardEma
    model: DiT  # the part of the engine's module that becomes live.safetensors and ema.safetensors
    origin: Mapping[str, str]  # codec and encoder, for the header of both


def save(root: Path, progress: Progress, layout: Layout, contents: Contents, keep: int) -> Path:
    """Write a checkpoint under `root`, then drop all but the newest `keep`. Every rank calls it.

    Communicates. Raises CheckpointError on every rank where one cannot write; `latest` then still names the checkpoint
    before, whole, and what was written of this one is gone.
    """
    world = contents.engine.world
    final = root / f"step{progress.step:08d}"
    draft = root / f".{final.name}.partial"
    try:
        files = _write_parts(draft, progress, contents)
        with together(world):
            if world.is_main:
                meta = _meta(progress, layout, contents.model.config, files)
                _writing(final, lambda: _publish(draft, final, meta, keep))
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def _write_parts(draft: Path, progress: Progress, contents: Contents) -> dict[str, tuple[int, str]]:
    """Write and flush all files but meta.json; returns size and sha256 of each, on every rank."""
    world = contents.engine.world
    with together(world):
        if world.is_main:
            _writing(draft, lambda: _fresh_folder(draft))
    errors = _attempt_parts(draft, progress, contents)
    with together(world):
        if errors:
            raise errors[0]
    digests: dict[str, tuple[int, str]] = {}
    with together(world):
        mine = _files_of_rank(_names_below(draft), world)
        digests = _writing(draft, lambda: {name: _flushed_digest(draft / name) for name in mine})
    return {name: digest for part in gather_objects(digests, world) for name, digest in part.items()}


def _attempt_parts(draft: Path, progress: Progress, contents: Contents) -> list[CheckpointError]:
    """Write every part; errors are returned, not raised, so that no rank leaves the others in a collective."""
    engine, ema, model, origin = contents
    errors: list[CheckpointError] = []

    def attempt(write: Callable[[], Any]) -> None:
        try:
            _writing(draft, write)
        except CheckpointError as error:
            errors.append(error)

    attempt(lambda: engine.save(draft / _ENGINE))
    attempt(lambda: ema.save(draft / _ema_name(engine.world.rank)))
    for name, weights in (("live", engine.full_weights), ("ema", ema.full_weights)):
        state = weights(model)
        if engine.world.is_main:
            meta = {"step": str(progress.step), "samples": str(progress.samples), "weights": name, **origin}
            attempt(partial(save_weights, draft / f"{name}.safetensors", state, model.config, meta))
    return errors


def _writing(place: Path, write: Callable[[], Any]) -> Any:
    """Call `write`; an operating system error becomes a CheckpointError."""
    try:
        return write()
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise CheckpointError(f"{place}: cannot be written ({reason}); free space or change output") from error


def _meta(progress: Progress, layout: Layout, model: ModelConfig, files: dict[str, tuple[int, str]]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "progress": progress._asdict(),
        "layout": layout._asdict(),
        "model": model.model_dump(mode="json"),
        "files": files,
    }


def _publish(draft: Path, final: Path, meta: dict[str, Any], keep: int) -> None:
    """Rename a finished folder into place, point `latest` at it, drop old ones."""
    root = final.parent
    _write_flushed(draft / META, json.dumps(meta, indent=1))
    for folder in {draft, *(path.parent for path in draft.rglob("*"))}:
        _flush_folder(folder)
    if final.exists():  # the same step, written before: it stays until the new one is in place
        final.rename(root / f".{final.name}.old.{time.time_ns()}")
    draft.rename(final)
    _flush_folder(root)
    _write_flushed(root / f".{LATEST}", final.name)
    os.replace(root / f".{LATEST}", root / LATEST)
    _flush_folder(root)
    _drop_old(root, final, keep)


def _drop_old(root: Path, newest: Path, keep: int) -> None:
    """Drop all but the `keep` checkpoints written last, and what crashed or replaced saves left behind."""
    written = sorted(root.glob("step*"), key=lambda folder: (folder / META).stat().st_mtime_ns, reverse=True)
    kept = [newest, *(folder for folder in written if folder != newest)][:keep]
    for folder in [*written, *root.glob(".step*")]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _fresh_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # left by a save that was cut off
    folder.mkdir(parents=True)


def _ema_name(rank: int) -> str:
    return f"ema_rank{rank:05d}.pt"


def _names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _files_of_rank(names: list[str], world: World) -> list[str]:
    """Files that one rank flushes and vouches for: its own shards; rank 0 also what is no rank's own."""
    mine = (f"zero_pp_rank_{world.rank}_", _ema_name(world.rank))
    shared = ("zero_pp_rank_", "ema_rank")
    own = [name for name in names if any(mark in name for mark in mine)]
    return own + [name for name in names if world.is_main and not any(mark in name for mark in shared)]


def _flushed_digest(path: Path) -> tuple[int, str]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path.stat().st_size, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
