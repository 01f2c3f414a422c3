"""Find the checkpoint that a run resumes, verify it, and load it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sharpmoe import durable
from sharpmoe.checkpoint import retention
from sharpmoe.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RunIdentity,
    read_manifest,
    split_files,
    verify_files,
)
from sharpmoe.checkpoint.rng import generators_file, restore_generators
from sharpmoe.checkpoint.state import Contents, StateReader
from sharpmoe.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from sharpmoe.errors import CheckpointDamageError, CheckpointError, first_line
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.trainable import trained_names
from sharpmoe.model.weights import check_architecture, check_finite
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks
from sharpmoe.parallel.zero.partitions import EMA, fill_pieces

_READ_IN_REHEARSAL = 4 << 30  # bytes; seconds
_START_NEW = "start a new run from its live.safetensors (checkpoint.init)"
# How to resolve a difference in each field of RunIdentity.
_FIXES = {
    "precision": f"set train.precision accordingly, or {_START_NEW}",
    "optimizer": f"set optim.name accordingly, or {_START_NEW}",
    "seed": f"set seed accordingly, or {_START_NEW}",
    "shards": f"point data.shards at the shards it was trained on, or {_START_NEW}",
}


class Found(NamedTuple):
    """Checkpoints that a run may resume, in the order in which they are tried; the same on every rank."""

    readable: tuple[Manifest, ...] = ()
    damaged: tuple[tuple[Path, CheckpointDamageError], ...] = ()  # folders whose manifest is missing or damaged
    barrier: CheckpointError | None = None  # why the next older one cannot be judged; none after it is tried


class ResumePoint(NamedTuple):
    """The checkpoint that a run resumes."""

    saved: Manifest | None  # None: start at step 0
    notes: tuple[str, ...] = ()  # damaged checkpoints that were skipped


def find_checkpoints(root: Path, resume: str) -> Found:
    """Read the manifests that checkpoint.resume names: of one checkpoint for a path, of every one for auto.

    Under auto a damaged manifest is passed over. One that cannot be read or understood for another reason (permissions,
    a network that fails, another version) is no damage, and what is older than it is not tried. No communication.
    Raises CheckpointError where the checkpoint to resume is missing, damaged or cannot be judged, where none of several
    is undamaged, and where `none` would mix a new run into another run's checkpoints.
    """
    if resume == "none":
        if (root / retention.LATEST).exists() or any(
            (path / MANIFEST).is_file() for path in retention.newest_first(root)
        ):
            raise CheckpointError(
                f"{root}: holds checkpoints, which checkpoint.resume: none would mix with a new run's; "
                "give the run another --name, or move them away"
            )
        return Found()
    if resume != "auto":
        return Found((read_manifest(_named(Path(resume))),))
    readable, damaged, barrier = [], [], None
    for folder in retention.newest_first(root):
        try:
            readable.append(read_manifest(folder))
        except CheckpointDamageError as error:
            damaged.append((folder, error))
        except CheckpointError as error:
            barrier = error
            break
    if barrier is not None and not readable:
        raise barrier
    if damaged and not readable:
        raise _none_sound(root, damaged)
    return Found(tuple(readable), tuple(damaged), barrier)


def _named(folder: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the newest of a checkpoints folder."""
    newest = retention.latest(folder)
    if newest is None and not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"checkpoint.resume: {folder} is no checkpoint (it has no {MANIFEST}); name a step folder, auto, or none"
        )
    return newest or folder


def check_fits(saved: Manifest, model: ModelConfig, identity: RunIdentity) -> None:
    """Raise CheckpointError on the first difference between a checkpoint and the run. No communication."""
    check_architecture(saved.model, model, str(saved.folder), may_attach=False)
    for field, there, here in zip(RunIdentity._fields, saved.identity, identity, strict=True):
        if there != here:
            raise CheckpointError(f"{saved.folder}: {field} is {there!r} there, {here!r} in the run; {_FIXES[field]}")


def check_trains_same(saved: Manifest, model: Backbone, run: RunConfig) -> None:
    """Raise CheckpointError where a checkpoint was saved by a run that trained other parameters. No communication.

    Their optimizer states and averages are in it, and those of no others.
    """
    _check_adapters(saved, run.lora)
    keys = ("trainable", "frozen")
    there = TrainConfig(**{key: tuple(saved.settings.get(f"train.{key}") or ()) for key in keys})
    if all(getattr(there, key) == getattr(run.train, key) for key in keys):
        return
    names = [name for name, _ in model.named_parameters()]
    before, now = (trained_names(names, each) for each in (run.model_copy(update={"train": there}), run))
    if before != now:
        name, trains = (min(before - now), True) if before - now else (min(now - before), False)
        raise CheckpointError(
            f"{saved.folder}: {name} is {'trained' if trains else 'frozen'} there, "
            f"{'frozen' if trains else 'trained'} in the run; set "
            + " and ".join(f"train.{key} to {list(getattr(there, key))}" for key in keys)
            + f", or {_START_NEW}"
        )


def _check_adapters(saved: Manifest, lora: LoraConfig) -> None:
    for key, now in lora.model_dump(mode="json").items():
        before = saved.settings.get(f"lora.{key}", LoraConfig().model_dump(mode="json")[key])
        if before != now:
            raise CheckpointError(
                f"{saved.folder}: lora.{key} is {before!r} there, {now!r} in the run; set lora.{key} to the former, or "
                f"{_START_NEW}"
            )


def first_sound(found: Found, root: Path, resume: str, world: World) -> ResumePoint:
    """Verify every file of the checkpoints found, each rank a share of the bytes, until one is undamaged.

    Communicates. Under `auto` a checkpoint that is proven to be damaged is renamed and noted, and `latest` names the
    one that is resumed. Raises CheckpointError on every rank, and renames nothing, where a checkpoint that would be
    resumed cannot be judged (a file that cannot be read, or that does not belong there), where no checkpoint is
    undamaged, and for a damaged one that was named by its path.
    """

    def verify(saved: Manifest) -> None:
        with raise_on_all_ranks(world):
            verify_files(saved, split_files(saved, world.size)[world.rank])

    choice, damaged = _first_that(found, root, resume, verify)
    if damaged and choice.saved is not None:
        with raise_on_all_ranks(world):
            if world.is_main:
                _set_aside(root, damaged, choice.saved.folder)
    return choice


def rehearse_resume(found: Found, root: Path, resume: str, model: Backbone) -> ResumePoint:
    """Choose as `first_sound` and read as `load_checkpoint`, alone and without changing anything. No communication.

    model: on the meta device. Of checkpoints of more than 4 GiB only sizes and headers are checked. Raises what these
    two raise.
    """

    def verify(saved: Manifest) -> None:
        verify_files(saved, saved.files, sizes_only=not _is_small(saved))

    choice, _ = _first_that(found, root, resume, verify)
    if choice.saved is not None:
        _read_all(choice.saved, model)
    return choice


def _first_that(
    found: Found, root: Path, resume: str, verify: Callable[[Manifest], None]
) -> tuple[ResumePoint, list[Path]]:
    """Return the first checkpoint that `verify` accepts and the damaged ones before it; see `first_sound`."""
    damaged = list(found.damaged)
    for saved in found.readable:
        try:
            verify(saved)
        except CheckpointDamageError as error:
            if resume != "auto":
                raise
            damaged.append((saved.folder, error))
            continue
        notes = tuple(f"{error}; skipped" for _, error in damaged)
        return ResumePoint(saved, notes), [folder for folder, _ in damaged]
    if found.barrier is not None:
        raise found.barrier
    if damaged:
        raise _none_sound(root, damaged)
    return ResumePoint(None), []


def _is_small(saved: Manifest) -> bool:
    return sum(file.size for file in saved.files.values()) <= _READ_IN_REHEARSAL


def _read_all(saved: Manifest, model: Backbone) -> None:
    """Read what `load_checkpoint` reads of a checkpoint, all ranks' pieces, into nothing."""
    reader = StateReader(saved.folder)
    if not _is_small(saved):
        return
    for name, parameter in model.named_parameters():
        for kind in sorted(reader.kinds) if parameter.requires_grad else ():
            reader.piece(kind, name, 0, parameter.numel())
    _load_buffers(model, saved.folder / "live.safetensors")


def _set_aside(root: Path, damaged: list[Path], sound: Path) -> None:
    with retention.disk_errors(root):
        durable.write_atomically(root / retention.LATEST, sound.name)
    for folder in damaged:
        if (folder / MANIFEST).is_file():  # a folder without one was not written by a save
            with retention.disk_errors(folder):
                retention.set_aside(folder)


def _none_sound(root: Path, damaged: list[tuple[Path, CheckpointDamageError]]) -> CheckpointError:
    order = retention.newest_first(root)
    _, newest = min(damaged, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    return CheckpointError(f"{root}: no checkpoint is sound; the newest: {newest}, or move them away to start again")


def load_checkpoint(saved: Manifest, contents: Contents) -> None:
    """Bring a run to the state of a checkpoint that is sound (`first_sound`) and fits (`check_fits`).

    Every rank calls it; communicates. The checkpoint may be of another number of ranks, ep_size or ZeRO stage. Raises
    CheckpointError on every rank where a part is missing; nothing in a file is executed.
    """
    engine, ema, model = contents.engine, contents.ema, contents.model
    with raise_on_all_ranks(engine.world):
        reader = StateReader(saved.folder)
        engine.state.restore(model, reader)
        fill_pieces(ema.shards, engine.state.pieces(model), partial(reader.piece, EMA))
        _load_buffers(model, saved.folder / "live.safetensors")
        own = saved.folder / generators_file(engine.world.rank)
        if own.name in saved.files:  # a rank that the saved run did not have keeps its generators
            restore_generators(own)
    engine.state.refresh_weights()


def _load_buffers(model: Backbone, path: Path) -> None:
    """Load buffers (thresholds, positions) from the weights file: they are equal on every rank."""
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, buffer in model.named_buffers():
                value = file.get_tensor(name)
                check_finite(name, value, str(path), "resume from an earlier checkpoint")
                buffer.copy_(value)
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error
