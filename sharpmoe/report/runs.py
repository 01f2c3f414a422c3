"""Find the weights of a run folder, a checkpoint folder or a file, and the configuration of their run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import CheckpointError

_Kind = Literal["ema", "live"]


class SavedModel(NamedTuple):
    """A weights file to sample from or to measure, and the run it belongs to."""

    weights: Path  # .safetensors
    run: RunConfig | None  # None for a weights file outside of a run folder
    folder: Path  # the run folder, or the folder of the weights file
    name: str  # such as "quickstart, step 200, ema"


def find_saved_model(path: Path | str, kind: _Kind = "ema") -> SavedModel:
    """Resolve a run folder (its latest checkpoint), one checkpoint folder, or a .safetensors file.

    Raises CheckpointError where there is nothing to load, naming what was looked for.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _checked(SavedModel(path, _run_above(path), path.parent, path.stem))
    checkpoint = path if (path / f"{kind}.safetensors").is_file() else _latest_checkpoint(path)
    folder = checkpoint.parent.parent
    name = f"{folder.name}, {checkpoint.name}, {kind}"
    return _checked(SavedModel(checkpoint / f"{kind}.safetensors", _run_above(checkpoint), folder, name))


def _latest_checkpoint(folder: Path) -> Path:
    """Return the folder of a run's newest checkpoint, which checkpoints/latest names."""
    pointer = folder / "checkpoints" / "latest"
    if not pointer.is_file():
        raise CheckpointError(f"{folder}: neither a run folder with checkpoints/latest nor a .safetensors file")
    return folder / "checkpoints" / pointer.read_text(encoding="utf-8").strip()


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
