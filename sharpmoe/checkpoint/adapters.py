"""The adapters of a checkpoint, alone, in peft's format: what `launcher/export.py --adapters` writes. No DeepSpeed."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpmoe.checkpoint.manifest import MANIFEST, read_manifest
from sharpmoe.config import LoraConfig
from sharpmoe.errors import CheckpointError, first_line
from sharpmoe.model.adapters import Adapters, is_adapter, save_adapters
from sharpmoe.model.trainable import planned_adapters

_KINDS = {"live": "master", "ema": "ema"}  # weights -> kind of the ranks' pieces


def export_adapters(checkpoint: Path, out: Path, weights: Literal["ema", "live"]) -> int:
    """Write the adapters of a checkpoint to the folder `out`; return the number of adapted layers.

    Raises CheckpointError where the run has none or a file cannot be read, OSError, and ConfigError without peft.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise CheckpointError(
            f"{checkpoint}: no checkpoint, and --adapters reads those of a run (a weights file holds them merged); "
            "name the run folder"
        )
    saved = read_manifest(checkpoint)
    fields = {key: saved.settings[f"lora.{key}"] for key in LoraConfig.model_fields if f"lora.{key}" in saved.settings}
    lora = LoraConfig.model_validate(fields)
    if not lora.rank:
        raise CheckpointError(
            f"{checkpoint}: its run has no adapters (lora.rank 0); export the whole weights, without --adapters"
        )
    adapters = planned_adapters(saved.model, lora)
    save_adapters(out, lora, read_adapters(checkpoint, adapters, weights))
    return len(adapters.pairs)


def read_adapters(checkpoint: Path, adapters: Adapters, weights: Literal["ema", "live"]) -> dict[str, Tensor]:
    """Return A and B of every adapter of a checkpoint, float32. Raises CheckpointError."""
    flat = _pieces(checkpoint, _KINDS[weights])
    return {name: flat[name].view(shape) for name, shape in adapters.shapes.items()}


def _pieces(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    """Return every adapter's A and B, flat, from the ranks' state files."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(checkpoint.glob("state_rank*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                places = json.loads(file.metadata()["places"])
                for name in (name for name in places if is_adapter(name)):
                    parts.setdefault(name, []).append((places[name], file.get_tensor(f"{kind}/{name}")))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); name another checkpoint") from error
    return {name: torch.cat([part for _, part in sorted(found, key=lambda f: f[0])]) for name, found in parts.items()}
