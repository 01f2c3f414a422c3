"""Find things in a run folder: weights, the resolved configuration, pictures, the log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import CheckpointError

Weights = Literal["ema", "live"]


class Source(NamedTuple):
    """Weights to sample from or to measure, and the run they belong to."""

    weights: Path
    run: RunConfig | None  # None where a weights file was named on its own
    folder: Path  # the run folder, or the folder of the weights file
    name: str  # such as "quickstart, step 200, ema"


def find_source(path: Path | str, weights: Weights = "ema") -> Source:
    """Resolve a run folder (its latest checkpoint), one checkpoint folder, or a .safetensors file.

    Raises CheckpointError where there is nothing to load, naming what was looked for.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _checked(Source(path, _run_above(path), path.parent, path.stem))
    checkpoint = path if (path / f"{weights}.safetensors").is_file() else latest_checkpoint(path)
    folder = checkpoint.parent.parent
    name = f"{folder.name}, {checkpoint.name}, {weights}"
    return _checked(Source(checkpoint / f"{weights}.safetensors", _run_above(checkpoint), folder, name))


def latest_checkpoint(folder: Path) -> Path:
    """Folder of a run's newest checkpoint, as checkpoints/latest names it."""
    pointer = folder / "checkpoints" / "latest"
    if not pointer.is_file():
        raise CheckpointError(f"{folder}: neither a run folder with checkpoints/latest nor a .safetensors file")
    return folder / "checkpoints" / pointer.read_text(encoding="utf-8").strip()


def _run_above(path: Path) -> RunConfig | None:
    """Configuration of the run whose checkpoints/ folder holds `path`; None for files outside a run."""
    for folder in path.parents:
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return load_run_config(folder / "config.yaml")
    return None


def _checked(source: Source) -> Source:
    if not source.weights.is_file():
        raise CheckpointError(f"{source.weights}: no such weights file; expected live.safetensors or ema.safetensors")
    return source
