"""Which checkpoint a run goes on from, and going on from it. `saving` writes them, `manifest` says what they hold."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from sharpmoe import durable
from sharpmoe.checkpoint import manifest, retention, rng
from sharpmoe.checkpoint.manifest import Layout, Manifest
from sharpmoe.checkpoint.snapshot import Contents, generators_file
from sharpmoe.checkpoint.state import StateReader, fill_partitions
from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.dit import DiT
from sharpmoe.model.weights import check_architecture
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks
from sharpmoe.parallel.zero.engine import EMA

_AGAIN = "begin a run from its live.safetensors with checkpoint.init"
# How to mend a difference in each field of Layout.
_MEND = {
    "precision": f"set train.precision accordingly, or {_AGAIN}",
    "optimizer": f"set optim.name accordingly, or {_AGAIN}",
    "seed": f"set seed accordingly, or {_AGAIN}",
    "shards": "point data.shards at the shards it was trained on, or begin a run with checkpoint.init",
}


class Found(NamedTuple):
    """Checkpoints that a run may go on from, the one to try first in front; the same on every rank."""

    readable: tuple[Manifest, ...] = ()
    refused: tuple[tuple[Path, CheckpointError], ...] = ()  # folders whose manifest is missing or damaged


class Choice(NamedTuple):
    """The checkpoint that a run goes on from."""

    saved: Manifest | None  # None: from the beginning
    notes: tuple[str, ...] = ()  # damaged ones that were passed over


def layout_of(run: RunConfig, fingerprint: str) -> Layout:
    """Layout of a run; `fingerprint` is that of the training shards."""
    return Layout(run.train.precision, run.optim.name, run.seed, fingerprint)


def find(root: Path, resume: str) -> Found:
    """Read the manifests of what checkpoint.resume names: every checkpoint for auto, one for a path. No communication.

    Raises CheckpointError where a named one is missing or damaged, where none of several can be read, and where `none`
    would mix a new run into another's checkpoints.
    """
    if resume == "none":
        if (root / retention.LATEST).exists():
            raise CheckpointError(
                f"{root}: holds checkpoints, which checkpoint.resume: none would mix with a new run's; "
                "set another name, or move them away"
            )
        return Found()
    if resume != "auto":
        return Found((manifest.read(_named(Path(resume))),))
    readable, refused = [], []
    for folder in retention.newest_first(root):
        try:
            readable.append(manifest.read(folder))
        except CheckpointError as error:
            refused.append((folder, error))
    found = Found(tuple(readable), tuple(refused))
    if refused and not readable:
        raise _none_sound(root, refused[0][1])
    return found


def _named(folder: Path) -> Path:
    """Checkpoint that a path means: itself, or the newest of a checkpoints folder."""
    newest = retention.latest(folder)
    if newest is None and not (folder / manifest.MANIFEST).is_file():
        raise CheckpointError(
            f"checkpoint.resume: {folder} is no checkpoint (it has no {manifest.MANIFEST}); name a step folder, auto, "
            "or none"
        )
    return newest or folder


def check_fits(saved: Manifest, model: ModelConfig, layout: Layout) -> None:
    """Raise CheckpointError on the first difference between a checkpoint and the run. No communication."""
    check_architecture(saved.model, model, str(saved.folder), may_attach=False)
    for field, there, here in zip(Layout._fields, saved.layout, layout, strict=True):
        if there != here:
            raise CheckpointError(f"{saved.folder}: {field} is {there!r} there, {here!r} in the run; {_MEND[field]}")


def choose(found: Found, root: Path, resume: str, world: World) -> Choice:
    """Verify every file of what was found, each rank a share of the bytes, until one checkpoint is sound.

    Communicates. Under `auto` a damaged one is set aside and noted, and `latest` names the one that is taken; a path is
    refused instead: CheckpointError on every rank, as where no checkpoint is sound.
    """
    damaged = list(found.refused)
    for saved in found.readable:
        try:
            with raise_on_all_ranks(world):
                manifest.check_strangers(saved)
                manifest.check_files(saved, manifest.shares(saved, world.size)[world.rank])
        except CheckpointError as error:
            if resume != "auto":
                raise
            damaged.append((saved.folder, error))
            continue
        notes = tuple(f"{error}; passed over" for _, error in damaged)
        if damaged:
            with raise_on_all_ranks(world):
                if world.is_main:
                    _settle(root, [folder for folder, _ in damaged], saved.folder)
        return Choice(saved, notes)
    if damaged:
        raise _none_sound(root, damaged[0][1])
    return Choice(None)


def _settle(root: Path, damaged: list[Path], taken: Path) -> None:
    with retention.disk_errors(root):
        durable.write_atomically(root / retention.LATEST, taken.name)
    for folder in damaged:
        if (folder / manifest.MANIFEST).is_file():  # without one it is no checkpoint of ours
            with retention.disk_errors(folder):
                retention.set_aside(folder)


def _none_sound(root: Path, first: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{root}: no checkpoint is sound; the newest: {first}, or move them away to begin again")


def load(saved: Manifest, contents: Contents) -> None:
    """Bring a run to the state of a checkpoint that is sound (`choose`) and fits (`check_fits`). Every rank calls it.

    The checkpoint may be of another number of ranks, ep_size or ZeRO stage. Communicates. Raises CheckpointError on
    every rank where a part is missing; nothing in a file is executed.
    """
    engine, ema, model, _ = contents
    with raise_on_all_ranks(engine.world):
        reader = StateReader(saved.folder)
        engine.restore(model, reader)
        fill_partitions({EMA: ema.shards}, engine.owned_pieces(model), reader)
        _load_buffers(model, saved.folder / "live.safetensors")
        own = saved.folder / generators_file(engine.world.rank)
        if own.name in saved.files:  # more ranks than before: the new ones draw as they like
            rng.restore(own)
    engine.refresh()


def _load_buffers(model: DiT, path: Path) -> None:
    """Buffers (thresholds, positions) are alike on every rank; the weights for others hold them."""
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error
