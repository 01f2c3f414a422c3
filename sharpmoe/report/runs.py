"""Find the weights of a run folder, a checkpoint folder or a file, and the configuration of their run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipeline.encode.like import keeps_codec, origin_header, origin_in
from data_pipeline.read.shards import ShardSet
from sharpmoe.checkpoint.manifest import Manifest
from sharpmoe.checkpoint.retention import latest, newest_first
from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.invocation import spell_command
from sharpmoe.model.published.folder import is_published_folder
from sharpmoe.model.published.own import own_folder
from sharpmoe.shipped_files import find_shipped

_Kind = Literal["ema", "live"]
_LISTED = 8  # runs or checkpoints that a message names, at most
EARLY_AVERAGE = 0.1  # share of averaged weights that is the start, above which they say little about what was learned


class SavedModel(NamedTuple):
    """A weights file to sample from or to measure, and the run it belongs to."""

    weights: Path  # .safetensors, or the folder of an exported or published model
    run: RunConfig | None  # None for a weights file outside of a run folder
    folder: Path  # the run folder, or the folder of the weights file
    name: str  # such as "quickstart, step 200, ema"


def find_saved_model(path: Path | str, kind: _Kind = "ema") -> SavedModel:
    """Resolve a run folder (its latest checkpoint), a checkpoint folder, a .safetensors file, or a folder of one model.

    The latter is what `export` has written, or Nucleus-Image in the layout of diffusers.

    Raises CheckpointError where there is nothing to load, naming what was looked for.
    """
    path = find_shipped(path)
    if path.suffix == ".safetensors":
        return _checked(SavedModel(path, _run_above(path), path.parent, path.stem))
    exported = own_folder(path)
    if exported is not None:
        return SavedModel(exported, None, path, path.resolve().name)
    if is_published_folder(path):
        return SavedModel(path, None, path, path.resolve().name)
    checkpoint = path if (path / f"{kind}.safetensors").is_file() else _latest_checkpoint(path)
    folder = checkpoint.parent.parent
    name = f"{folder.name}, {checkpoint.name}, {kind}"
    return _checked(SavedModel(checkpoint / f"{kind}.safetensors", _run_above(checkpoint), folder, name))


def find_origin(saved: SavedModel, header: Mapping[str, str]) -> dict[str, str]:
    """Return what is known of codec and text encoder of a model: the `header` of its weights, else its run's shards."""
    origin = origin_in(header)
    if saved.run is None or keeps_codec(origin):
        return origin
    data = saved.run.data
    try:
        return origin_header(ShardSet.open(data.first_place, data.train_split, data.remote.options()))
    except DataError:
        return origin


def check_overwrites_no_weights(out: Path, source: Path) -> None:
    """Raise ConfigError where writing `out` would replace `source`, which is being read, or a file of a checkpoint."""
    if out.exists() and source.exists() and out.samefile(source):
        raise ConfigError(f"{out}: is the file that is read, which would be lost; choose another place")
    if Manifest.is_in(out.parent):
        raise ConfigError(
            f"{out}: {out.parent} is a checkpoint, which could not be resumed with another file; choose another place"
        )


def average_note(saved: SavedModel) -> str:
    """Return a note where much of averaged weights is still what the run started from; "" where it is not.

    After n steps the share is optim.ema_decay ** n: 99 % after 100 steps of 0.9999.
    """
    step = saved.weights.parent.name.removeprefix("step")
    if saved.run is None or saved.weights.stem != "ema" or not step.isdigit():
        return ""
    share = saved.run.optim.ema_start_share(int(step))
    if share <= EARLY_AVERAGE:
        return ""
    decay = saved.run.optim.ema_decay
    return (
        f"note: {saved.name}: {share:.1%} of the averaged weights is still what the run started from (optim.ema_decay "
        f"{decay:g} after {int(step)} steps); --weights live shows what it has learned"
    )


def _latest_checkpoint(folder: Path) -> Path:
    """Return the folder of a run's newest checkpoint, which checkpoints/latest names."""
    named = latest(folder / "checkpoints")
    if named is None:
        raise CheckpointError(f"{folder}: {_what_instead(folder)}")
    if not named.is_dir():
        raise CheckpointError(f"{folder}: checkpoints/latest names {named.name}, which is not there; {_others(folder)}")
    return named


def _others(folder: Path) -> str:
    """Say which checkpoints a run folder has, the newest first."""
    found = [str(path) for path in newest_first(folder / "checkpoints")]
    return f"give the checkpoint itself: {' | '.join(found[:_LISTED])}" if found else "the run has no other checkpoint"


def _what_instead(folder: Path) -> str:
    """Say what a path is that holds no weights, and what to give in its place."""
    neither = "neither a run folder with checkpoints/latest nor a .safetensors file"
    if not folder.exists():
        return f"{neither}: it does not exist; correct the path"
    if any(newest_first(folder / "checkpoints")):
        return f"{neither}: checkpoints/latest is missing or damaged; {_others(folder)}"
    if (folder / "config.yaml").is_file():
        return f"{neither}: this run has saved no checkpoint yet; wait until it has (checkpoint.every)"
    runs = sorted(str(pointer.parents[1]) for pointer in folder.glob("*/checkpoints/latest"))
    if runs:
        more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
        return f"{neither}, but the folder of several runs; give one of {', '.join(runs[:_LISTED])}{more}"
    return f"{neither}; weights of other projects are converted with `{spell_command('convert')}`"


def _run_above(path: Path) -> RunConfig | None:
    """Return the configuration of the run whose checkpoints/ folder holds `path`; None for files outside a run."""
    for folder in path.parents:
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return load_run_config(folder / "config.yaml")
    return None


def _checked(saved: SavedModel) -> SavedModel:
    if not saved.weights.is_file():
        raise CheckpointError(f"{saved.weights}: no such weights file; expected live.safetensors or ema.safetensors")
    return saved
