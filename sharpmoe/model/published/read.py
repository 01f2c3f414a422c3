"""Read state dicts from published checkpoint files: .pth, .pt, .safetensors, folders of shards, nested dicts."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import is_own_weights

_PLACES = {
    "ema": ("ema_model_state_dict", "ema", "model_ema", "ema_state_dict"),
    "model": ("model_state_dict", "model", "state_dict", "module"),
}
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_state(source: str | Path | Mapping[str, Any], weights: str = "ema") -> dict[str, Tensor]:
    """Read a state dict from a .pth/.pt, a .safetensors, a folder of either, or a (nested) dict.

    weights: "ema" or "model", for a training checkpoint that holds both; a plain state dict is returned as it is.
    Files are read as tensors only: nothing in them is executed. Raises CheckpointError.
    """
    if isinstance(source, Mapping):
        return _pick(source, weights, "the state dict")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, weights)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .pth, .pt or .safetensors file, or a folder of them")
    _refuse_other_content(path)
    try:
        if path.suffix == ".safetensors":
            if is_own_weights(path):
                raise CheckpointError(
                    f"{path}: is a weights file of this project already; start a run from it as it is "
                    "(checkpoint.init), or write it under published names with launcher/convert.py --to FAMILY"
                )
            return _pick(load_file(path), weights, str(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # their trainers save their arguments
            return _pick(torch.load(path, map_location="cpu", weights_only=True), weights, str(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be read as tensors only ({reason}); save its state dict again, with safetensors"
        ) from error


def _refuse_other_content(path: Path) -> None:
    """Raise CheckpointError for what a download leaves in place of a checkpoint: nothing, a pointer, a web page."""
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if not start:
        raise CheckpointError(f"{path}: is empty, as a broken download leaves it; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; download the file itself")


def _read_folder(path: Path, weights: str) -> dict[str, Tensor]:
    files = sorted(file for suffix in ("safetensors", "pth", "pt", "bin") for file in path.glob(f"*.{suffix}"))
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1:
        raise CheckpointError(
            f"{path}: holds {len(files)} checkpoint files of {len(suffixes)} kinds, expected shards of one"
        )
    state: dict[str, Tensor] = {}
    for file in files:
        part = read_state(file, weights)
        twice = [key for key in part if key in state]
        if twice:
            raise CheckpointError(f"{path}: key {twice[0]} is in two files; a folder must hold the shards of one model")
        state |= part
    return state


def _pick(found: Any, weights: str, where: str) -> dict[str, Tensor]:
    """Find the tensors of one model in the (nested) content of a file."""
    if weights not in _PLACES:
        raise CheckpointError(f"weights is {weights!r}, expected ema or model")
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{where}: holds a {type(found).__name__}, expected a state dict")
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    for place in _PLACES[weights]:
        if place in nested:
            return _pick(found[place], weights, f"{where}: {place}")
    state = {key: _dense(key, value, where) for key, value in found.items() if isinstance(value, Tensor)}
    if not state:
        held = ", ".join(map(str, found))
        raise CheckpointError(f"{where}: no {weights} weights among {held}; set weights to the other of ema and model")
    while any(all(key.startswith(prefix) for key in state) for prefix in _PREFIXES):
        state = {key.split(".", 1)[1]: value for key, value in state.items()}
    return state


def _dense(key: str, value: Tensor, where: str) -> Tensor:
    """Return a tensor that can be computed with: sparse ones dense, 8-bit floats as float32, which holds them exactly.

    Raises CheckpointError for a quantised one, whose values its scale decides, and for one that is no real number.
    """
    if value.is_quantized or value.is_complex() or value.is_meta:
        kind = "without values" if value.is_meta else str(value.dtype)
        raise CheckpointError(f"{where}: {key} is a tensor {kind}, expected real numbers; save it as float32")
    if value.layout != torch.strided:
        value = value.to_dense()
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value
