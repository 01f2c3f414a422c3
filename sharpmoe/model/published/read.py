"""Read published checkpoint files: .pth, .pt, .safetensors, shards of one model, and whole training checkpoints.

A training checkpoint holds several copies of the model (live, averaged) among other things, under prefixes that depend
on the trainer. A copy is found by a key that every published diffusion transformer has, so no trainer is known by name.
"""

import argparse
import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PosixPath
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.invocation import spell_command
from sharpmoe.model.published.folder import is_published_folder
from sharpmoe.model.published.names import DIFFUSERS_KEY, from_diffusers
from sharpmoe.model.published.own import own_folder
from sharpmoe.model.weights import is_own_weights

WeightsKind = Literal["ema", "model"]  # averaged, or live

_ANCHOR = "x_embedder.proj.weight"  # in every copy of a model
_WITHOUT_DOTS = _ANCHOR.replace(".", "")
# Names that wrappers put into keys, at any place: DistributedDataParallel and DeepSpeed, torch.compile, FSDP,
# activation checkpointing, Lightning's strategies.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_PARTS = frozenset({"x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer"})  # of a model
_INSIDE = _WRAPPERS | {"model", "net", "ema_model"}  # names of wrappers around a part of a model, after its name
_AVERAGED = re.compile(r"(^|_)(ema|averaged|shadow)(_|$)")  # a part of the prefix of averaged weights
_LIVE = frozenset({"online", "online_model"})  # ema-pytorch's live weights, beside its ema_model
_SHARD_SUFFIXES = ("safetensors", "pth", "pt", "bin")
# What trainers save beside tensors and what runs no code when it is read: arguments, paths, numbers of NumPy.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u8", "u1", "?")),
    np.float64(0).__reduce__()[0],  # makes a NumPy scalar of bytes
]


class PublishedState(NamedTuple):
    """The tensors of one model, and how they were found."""

    tensors: dict[str, Tensor]  # under published key names
    kind: str  # "ema", "model", or "plain" for a file that holds one model and does not say which weights they are
    notes: tuple[str, ...]  # what was chosen, which prefixes were removed, what was left out


class _Copy(NamedTuple):
    """One of the models in a checkpoint."""

    prefix: str  # "", or with a dot at its end
    kind: str
    keys: dict[str, str]  # published key name -> key in the checkpoint


def read_state(source: str | Path | Mapping[str, Any], weights: WeightsKind | None = None) -> PublishedState:
    """Read the tensors of one model from a .pth/.pt, a .safetensors, an index or folder of shards, or a (nested) dict.

    weights: which copy of a training checkpoint; None is the averaged one where there is one, else the live one. Files
    are read as tensors only: nothing in them is executed. Raises CheckpointError.
    """
    if weights not in (None, *get_args(WeightsKind)):
        raise CheckpointError(f"weights is {weights!r}, expected ema or model")
    if isinstance(source, Mapping):
        return _select(source, weights, "the state dict")
    path = Path(source)
    return _select(_read_folder(path) if path.is_dir() else _read_file(path), weights, str(path))


def refuse_own(path: Path) -> None:
    """Raise CheckpointError where `path` is a model of this project, which says itself what it is."""
    if (path / "checkpoints" / "latest").is_file():
        raise CheckpointError(
            f"{path}: is a run folder of this project, not a published checkpoint; sharpmoe.load(FOLDER) and the "
            "commands read it as it is; its weights, for checkpoint.init, are "
            "checkpoints/stepNNNNNNNN/ema.safetensors"
        )
    if own_folder(path) is not None:
        raise CheckpointError(
            f"{path}: is a model that this project has exported; sharpmoe.load(FOLDER), checkpoint.init and the "
            "commands read it as it is"
        )
    if path.is_file() and _is_safetensors(path) and is_own_weights(path):
        raise CheckpointError(
            f"{path}: is a weights file of this project already; sharpmoe.load(FILE), checkpoint.init and the commands "
            f"read it as it is, and `{spell_command('convert')} --to FAMILY` writes it under published names"
        )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_folder(path: Path) -> dict[str, Any]:
    refuse_own(path)
    if is_published_folder(path):
        raise CheckpointError(
            f"{path}: is Nucleus-Image in the layout of diffusers; `{spell_command('convert')} --family nucleus`, "
            'load_pretrained(FOLDER, family="nucleus"), sharpmoe.load(FOLDER) and checkpoint.init read it'
        )
    if (path / "model_index.json").is_file() and (path / "transformer").is_dir():  # a pipeline of diffusers
        return _read_folder(path / "transformer")
    states = sorted(path.glob("mp_rank_*_model_states.pt"))  # DeepSpeed: beside them are optimizer states
    files = states or sorted(file for suffix in _SHARD_SUFFIXES for file in path.glob(f"*.{suffix}"))
    suffixes = {file.suffix for file in files}
    if not files:
        raise CheckpointError(f"{path}: holds no .{', .'.join(_SHARD_SUFFIXES)} file; name the file of the checkpoint")
    if len(suffixes) != 1:
        raise CheckpointError(
            f"{path}: holds {len(files)} checkpoint files of {len(suffixes)} kinds, expected shards of one; name a file"
        )
    index = sorted(path.glob(f"*{files[0].suffix}.index.json"))
    if len(index) == 1:
        return dict(_read_file(index[0]))
    return dict(_read_file(files[0])) if len(files) == 1 else _join(files, path)


def _join(files: Iterable[Path], where: Path) -> dict[str, Any]:
    """Join the content of the shards of one model."""
    joined: dict[str, Any] = {}
    for file in files:
        part = _flat(_read_file(file))
        twice = [key for key in part if key in joined]
        if twice:
            raise CheckpointError(
                f"{where}: key {twice[0]} is in two files; a folder must hold the shards of one model: name one file"
            )
        joined |= part
    return joined


def _read_file(path: Path) -> Mapping[str, Any]:
    """Return the content of a file, told by its first bytes and not by its suffix. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a .pth, .pt or .safetensors file, or a folder of them")
    with path.open("rb") as file:
        start = file.read(256)
    _refuse_other_content(path, start)
    try:
        if start[8:9] == b"{":
            refuse_own(path)
            return load_file(path)
        if start.lstrip().startswith(b"{"):
            return _read_index(path)
        found = _load_pickle(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise CheckpointError(f"{path}: {_unreadable(error)}") from error
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected a state dict; save model.state_dict()")
    return found


def _load_pickle(path: Path) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as file:
            if not any(name.endswith("data.pkl") for name in file.namelist()):
                raise CheckpointError(f"{path}: is a zip archive, not a checkpoint; unpack it and name the file in it")
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on files that it then refuses
        # Mapped, so that optimizer states beside the weights are not read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _unreadable(error: Exception) -> str:
    """Return what is wrong with a file that torch or safetensors cannot read; torch's own texts are advice on it."""
    text = str(error)
    called = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and called is not None:
        return (
            f"holds Python objects ({called[1]}) beside tensors, and nothing in a checkpoint is executed; save its "
            "state dict again, with safetensors, where its code is trusted"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive, not a checkpoint; save model.state_dict() with safetensors"
    reason = "" if "weights_only" in text or "Weights only" in text else f" ({(text.splitlines() or [''])[0]})"
    return (
        f"cannot be read as tensors only{reason}: not a checkpoint, or cut off; compare its size with the "
        "publisher's and download it again, or save its state dict again, with safetensors"
    )


def _read_index(path: Path) -> dict[str, Any]:
    """Read the shards that model.safetensors.index.json lists. Raises CheckpointError where one is missing."""
    try:
        shards = json.loads(path.read_bytes())["weight_map"]
        files = [path.parent / name for name in sorted(set(shards.values()))]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path}: is JSON without a weight_map, not a checkpoint; name the file that holds its tensors"
        ) from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {len(files)} shards are not beside it ({missing[0]}); download them too"
        )
    return _join(files, path)


def _refuse_other_content(path: Path, start: bytes) -> None:
    """Raise CheckpointError for what a download leaves in place of a checkpoint: nothing, a pointer, a web page."""
    text = start.lstrip().lower()
    if not text:
        raise CheckpointError(f"{path}: is empty, as a broken download leaves it; download it again")
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; download the file itself")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")) or tarfile.is_tarfile(path):
        raise CheckpointError(f"{path}: is an archive, not a checkpoint; unpack it and name the file in it")


def _flat(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a nested dict under dotted keys."""
    return {f"{path}{key}": value for path, held in _dicts(found) for key, value in held.items()}


def _dicts(found: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict inside a nested dict that holds tensors, with its dotted path."""
    held = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if held:
        yield path, held
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _dicts(value, f"{path}{key}.")


def _select(found: Mapping[str, Any], weights: WeightsKind | None, where: str) -> PublishedState:
    """Choose one model of the (nested) content of a checkpoint. Raises CheckpointError."""
    dicts, wrappers = _without_wrappers(found, where)
    if not dicts:
        held = ", ".join(map(str, list(found)[:8])) or "nothing"
        raise CheckpointError(f"{where}: holds no tensors under names, only {held}; save model.state_dict()")
    content = {f"{path}{key}": value for path, held in dicts for key, value in held.items()}
    copies = [copy for path, held in dicts for copy in _find_copies(path, list(held))]
    copies += _averages_without_dots(content, copies, where)
    chosen = _choose(copies, weights, where) if copies else _Copy("", "plain", {key: key for key in content})
    tensors = {name: _dense(key, content[key], where) for name, key in chosen.keys.items()}
    notes = [*_notes(content, chosen, wrappers), *_nameless(found)]
    if DIFFUSERS_KEY in tensors:
        tensors = from_diffusers(tensors)
        notes.append("key names of diffusers translated")
    empty = [name for name, value in tensors.items() if not value.numel()]
    if empty:
        raise CheckpointError(
            f"{where}: {empty[0]} is empty, as in one rank's part of a ZeRO-3 checkpoint; join the parts first, with "
            "the zero_to_fp32.py that DeepSpeed puts beside them"
        )
    return PublishedState(tensors, chosen.kind, tuple(notes))


def _without_wrappers(found: Mapping[str, Any], where: str) -> tuple[list[tuple[str, dict[str, Tensor]]], list[str]]:
    """Return the dicts of tensors in a nested dict without the names of wrappers in their keys, and those names."""
    removed: dict[str, None] = {}

    def plain(key: str) -> str:
        parts = key.split(".")
        inside = next((place for place, part in enumerate(parts) if part in _PARTS), len(parts))
        dropped = [part in (_WRAPPERS if place < inside else _INSIDE) for place, part in enumerate(parts)]
        removed.update(dict.fromkeys(part for part, drop in zip(parts, dropped, strict=True) if drop))
        return ".".join(part for part, drop in zip(parts, dropped, strict=True) if not drop)

    dicts = [(plain(path), {plain(key): value for key, value in held.items()}) for path, held in _dicts(found)]
    named = Counter(f"{path}{key}" for path, held in dicts for key in held)
    twice = [key for key, count in named.items() if count > 1]
    if twice or len(named) < len(_flat(found)):
        raise CheckpointError(f"{where}: without the names of wrappers two tensors have one name; save one model alone")
    return dicts, list(removed)


def _find_copies(path: str, keys: list[str]) -> Iterator[_Copy]:
    """Yield the models in one dict of a checkpoint: each prefix of the anchor, without what has a longer prefix."""
    prefixes = [key.removesuffix(_ANCHOR) for key in keys if key == _ANCHOR or key.endswith(f".{_ANCHOR}")]
    averages = [key.removesuffix(_WITHOUT_DOTS) for key in keys if key.endswith(_WITHOUT_DOTS)]
    for prefix in prefixes:
        longer = tuple(other for other in prefixes + averages if len(other) > len(prefix) and other.startswith(prefix))
        own = [key for key in keys if key.startswith(prefix) and not (longer and key.startswith(longer))]
        kind = _kind(path + prefix) or ("model" if path else "plain")
        yield _Copy(path + prefix, kind, {key.removeprefix(prefix): path + key for key in own})


def _kind(prefix: str) -> WeightsKind | None:
    """Return which weights are under a prefix, None where it does not say."""
    for part in reversed(prefix.split(".")):
        if part in _LIVE:
            return "model"
        if _AVERAGED.search(part):
            return "ema"
    return None


def _averages_without_dots(content: Mapping[str, Tensor], copies: list[_Copy], where: str) -> Iterator[_Copy]:
    """Yield LitEma's averages: their names lack the dots, and what is not averaged is that of the live model."""
    for key in [key for key in content if key.endswith(_WITHOUT_DOTS)]:
        prefix = key.removesuffix(_WITHOUT_DOTS)
        live = [copy for copy in copies if copy.kind != "ema"]
        if len(live) != 1:
            raise CheckpointError(
                f"{where}: averages {prefix}* have names without dots, as LitEma writes them, and need one live model "
                f"beside them for the names, found {len(live)}; save the averaged model's own state dict"
            )
        averages = {name: f"{prefix}{name.replace('.', '')}" for name in live[0].keys}
        found = {name: key if key in content else live[0].keys[name] for name, key in averages.items()}
        yield _Copy(prefix, "ema", found)


def _choose(copies: list[_Copy], weights: WeightsKind | None, where: str) -> _Copy:
    held = ", ".join(f"{copy.kind} ({copy.prefix.rstrip('.') or 'no prefix'})" for copy in copies)
    if len(copies) == 1 and copies[0].kind == "plain":
        return copies[0]
    kinds = {copy.kind for copy in copies}
    copies = [copy._replace(kind="model") if copy.kind == "plain" else copy for copy in copies]
    wanted = weights or ("ema" if "ema" in kinds else "model")
    chosen = [copy for copy in copies if copy.kind == wanted]
    if not chosen:
        other = "model" if wanted == "ema" else "ema"
        raise CheckpointError(f"{where}: no {wanted} weights, it holds {held}; choose --weights {other}")
    if len(chosen) > 1:
        raise CheckpointError(f"{where}: holds {held}, expected one model of kind {wanted}; save the one alone")
    live = [copy for copy in copies if copy.kind == "model"]
    if wanted == "ema" and len(live) == 1:  # averages of parameters alone: buffers are those of the live model
        return chosen[0]._replace(keys=live[0].keys | chosen[0].keys)
    return chosen[0]


def _notes(content: Mapping[str, Tensor], chosen: _Copy, wrappers: list[str]) -> Iterator[str]:
    taken = set(chosen.keys.values())
    own = sum(key.startswith(chosen.prefix) for key in taken)
    named = {"ema": "averaged (ema)", "model": "live (model)"}.get(chosen.kind, "the only")
    yield f"{named} weights: {len(taken)} tensors" + (f" under {chosen.prefix.rstrip('.')}" if chosen.prefix else "")
    if own != len(taken):
        yield f"{len(taken) - own} of them, which are not averaged, from the live weights"
    if wrappers:
        yield f"names of wrappers removed: {', '.join(wrappers)}"
    left = Counter(key.split(".")[0] for key in content if key not in taken)
    if left:
        yield "left out: " + ", ".join(f"{count} under {name}" for name, count in left.most_common(6))


def _nameless(found: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """Yield a note on every list of tensors, such as the shadow_params of some averages, which have no names."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _nameless(value, f"{path}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
            yield f"not read: {path}{key}, a list of {len(value)} tensors without names"


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
