"""Weights files of ours, and loading of published checkpoints (`sharpmoe.model.published.names` knows their names)."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sharpmoe.config import TOKEN_CHOICE, ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.attach import extend_to_text
from sharpmoe.model.dit import DiT
from sharpmoe.model.initial import initial_value
from sharpmoe.model.published.names import (
    CONVENTIONS,
    ROUTERS,
    SPELLINGS,
    Convention,
    Family,
    convert_published,
)
from sharpmoe.model.published.read import read_state
from sharpmoe.model.published.sizes import read_sizes
from sharpmoe.model.weights_file import Planned, WeightsWriter

FORMAT = "sharpmoe-1"
NEW_ALLOWED = ("saliency_router",)  # parts a base checkpoint may lack: they start as an identity


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, meta: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors with the architecture and `meta` in its header; atomic (rename)."""
    planned = {name: Planned(value.shape, value.dtype) for name, value in state.items()}
    with WeightsWriter(path, planned, _header(config, meta or {})) as writer:
        for name, value in state.items():
            writer.write(name, value)


def planned_weights(config: ModelConfig) -> dict[str, Planned]:
    """Parameters, then buffers of a model, as a weights file holds them: float32."""
    with torch.device("meta"):
        model = DiT(config)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: Planned(tensor.shape, torch.float32) for name, tensor in tensors}


def weights_writer(
    path: str | Path, planned: Mapping[str, Planned], config: ModelConfig, meta: Mapping[str, str]
) -> WeightsWriter:
    """Open a weights file for the planned tensors of a model, to be written one by one, in order. Raises OSError."""
    return WeightsWriter(path, planned, _header(config, meta))


def _header(config: ModelConfig, meta: Mapping[str, str]) -> dict[str, str]:
    return {"format": FORMAT, "model": config.model_dump_json(), **meta}


def stored_as(state: Mapping[str, Tensor], model: DiT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state dict with the parameters of `model` in `dtype`, for a smaller file; buffers stay float32."""
    parameters = {name for name, _ in model.named_parameters()}
    return {key: value.to(dtype) if key in parameters else value for key, value in state.items()}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, str]]:
    """Read a weights file of ours: tensors, architecture, meta. CheckpointError names what is wrong with the file."""
    config, meta = read_header(path)
    try:
        return load_file(path), config, meta
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error}); copy or export it again") from error


def read_header(path: str | Path) -> tuple[ModelConfig, dict[str, str]]:
    """Read architecture and meta of a weights file of ours, without its tensors. CheckpointError as `read_weights`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; give the path of a .safetensors written by this project")
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error}); copy or export it again") from error
    if meta.get("format") != FORMAT or "model" not in meta:
        raise CheckpointError(
            f"{path}: format {meta.get('format')!r}, expected {FORMAT!r}: not written by this project"
        )
    try:
        config = ModelConfig(**json.loads(meta["model"]))
    except (ValidationError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: its header holds an architecture that cannot be read; export it again"
        ) from error
    return config, {key: value for key, value in meta.items() if key not in ("format", "model")}


class StartingWeights:
    """What a model's tensors are at the start, one at a time: a weights file's where it has them, drawn otherwise.

    A model need never be whole on one host: the file is read tensor by tensor, and of stacked experts only a part.
    """

    def __init__(self, config: ModelConfig, seed: int, path: str | Path | None = None) -> None:
        """Look at the header of `path`. Raises CheckpointError where it is of another architecture."""
        self.config, self.seed, self.path = config, seed, path
        self.meta: dict[str, str] = {}
        self._found: frozenset[str] = frozenset()
        if path is not None:
            found, self.meta = read_header(path)
            check_architecture(found, config, str(path))
            with torch.device("meta"):
                own = {key: value.shape for key, value in DiT(config).state_dict().items()}
            with safe_open(path, framework="pt") as file:
                shapes = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            check_keys(own, shapes, str(path))
            self._found = frozenset(shapes)

    def __call__(self, name: str, shape: Sequence[int], experts: range | None = None) -> Tensor:
        """Value of one parameter or buffer, float32 on the host; of stacked experts only those asked for."""
        if name not in self._found:
            return initial_value(name, shape, self.config, self.seed, experts)
        with safe_open(self.path, framework="pt") as file:
            whole = file.get_slice(name)
            value: Tensor = whole[:] if experts is None else whole[experts.start : experts.stop]
        return value.float()


def load_model(path: str | Path) -> tuple[DiT, dict[str, str]]:
    """Build the model that a weights file holds, float32, in eval mode, with the file's meta."""
    state, config, meta = read_weights(path)
    model = DiT(config)
    copy_state(model, state, str(path))
    return model.eval(), meta


def check_architecture(found: ModelConfig, expected: ModelConfig, where: str) -> None:
    """Raise CheckpointError on the first architectural field that differs (a new saliency router is not one)."""
    free = {"preset", "saliency_router", "capacity_selection"}
    resolved = {"expert_hidden": "expert_width", "shared_hidden": "shared_width"}  # None stands for a computed width
    for field in ModelConfig.model_fields:
        have, want = (getattr(config, resolved.get(field, field)) for config in (found, expected))
        if field not in free and have != want:
            raise CheckpointError(
                f"{where}: model.{field} is {have!r} there, {want!r} in the run; "
                f"set model.{field} to {have!r} or use other weights"
            )


def copy_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Copy a state dict into a model; returns the keys that were new. CheckpointError on any other mismatch."""
    own = model.state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    missing = check_keys({key: value.shape for key, value in own.items()}, shapes, where)
    with torch.no_grad():
        for key, value in state.items():
            if key in own:
                own[key].copy_(value)
    return missing


def check_keys(own: Mapping[str, torch.Size], found: Mapping[str, torch.Size], where: str) -> tuple[str, ...]:
    """Compare the keys and shapes of a model and a weights file; returns the model's keys that may be new and are.

    Raises CheckpointError on any other difference.
    """
    missing = tuple(key for key in own if key not in found)
    lost = [key for key in missing if not any(part in key for part in NEW_ALLOWED)]
    extra = [key for key in found if key not in own and not any(part in key for part in NEW_ALLOWED)]
    if lost or extra:
        key, what = (lost[0], "is missing") if lost else (extra[0], "is unknown")
        raise CheckpointError(
            f"{where}: key {key} {what} ({len(lost)} missing, {len(extra)} unknown): another architecture"
        )
    for key, shape in found.items():
        if key in own and own[key] != shape:
            shapes = f"{tuple(shape)}, expected {tuple(own[key])}"
            raise CheckpointError(f"{where}: key {key} has shape {shapes}: another architecture")
    return missing


class PretrainedReport(NamedTuple):
    """What became of a published checkpoint's keys. Unmatched keys are an error, so there is no list of them."""

    loaded: tuple[str, ...]  # our keys that the checkpoint gave
    new: tuple[str, ...]  # our keys that it lacks: freshly attached saliency routers
    assumed: dict[str, Any]  # fields that its tensors cannot tell and the caller did not

    def line(self) -> str:
        """Say it in one line."""
        told = ", ".join(f"{key} {value}" for key, value in self.assumed.items())
        return f"{len(self.loaded)} loaded, {len(self.new)} new, 0 unmatched" + (f"; assumed: {told}" if told else "")


def load_pretrained(
    source: str | Path | Mapping[str, Any],
    family: Family,
    router: str,
    *,
    conditioning: Literal["class", "text"] = "class",
    weights: Literal["ema", "model"] = "ema",
    **sizes: Any,
) -> DiT:
    """Build the model of a published checkpoint in our convention: v = model(x_t, t, labels).v, t = 0 data, 1 noise.

    source: .pth/.pt (read with weights_only), .safetensors, a folder of shards, or a state dict. family and router name
    its publication, since key names coincide. sizes: any field of `ModelConfig` (latent_size, depth, width, num_heads,
    num_experts, capacity, num_classes, top_k, saliency_router, ...), also in published spelling; what is not given is
    read from the tensors, or, where they cannot tell, assumed as published and logged. capacity of a token-choice
    family is its top_k. conditioning "text" extends a class-conditional trunk: see `sharpmoe.model.attach`.
    Returns float32 in eval mode. Raises CheckpointError for a file that cannot be read, unknown names, a key without a
    counterpart, or a size that is neither given nor known.
    """
    model, report = read_pretrained(source, family, router, weights=weights, **sizes)
    logging.getLogger(__name__).info("%s: %s", _name(source), report.line())
    if conditioning == "text" and model.config.conditioning == "class":
        model = extend_to_text(model, **{key: sizes[key] for key in ("text_width", "pooled_width") if key in sizes})
    return model


def read_pretrained(
    source: str | Path | Mapping[str, Any], family: Family, router: str, *, weights: str = "ema", **sizes: Any
) -> tuple[DiT, PretrainedReport]:
    """`load_pretrained` of a class- or text-conditional checkpoint as it is, with the report of its keys."""
    if family not in ROUTERS or router not in ROUTERS[family]:
        known = "; ".join(f"{name}: {', '.join(routers)}" for name, routers in ROUTERS.items())
        raise CheckpointError(f"family {family!r} has no router {router!r}; known are {known}")
    return build_published(read_state(source, weights), CONVENTIONS[family], router, _name(source), **sizes)


def build_published(
    state: Mapping[str, Tensor], convention: Convention, router: str, where: str, **sizes: Any
) -> tuple[DiT, PretrainedReport]:
    """Build the model of a published state dict under any convention, in eval mode. CheckpointError names `where`."""
    config, assumed = published_config(state, convention, router, sizes)
    model = DiT(config)
    new = copy_state(model, convert_published(state, convention), where)
    loaded = tuple(key for key in model.state_dict() if key not in new)
    return model.eval(), PretrainedReport(loaded, new, assumed)


def published_config(
    state: Mapping[str, Tensor], convention: Convention, router: str, sizes: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture of a published state dict, and which of its fields were assumed. CheckpointError where it fails."""
    given = {SPELLINGS.get(key, key): value for key, value in sizes.items() if value is not None}
    if "rope_type" in given:
        kind = str(given.pop("rope_type"))
        given["positions"] = "sincos" if kind == "none" else f"rope_{kind}"
    if router == "dense":
        given = {key: value for key, value in given.items() if key not in ("num_experts", "capacity", "top_k")}
    elif router in TOKEN_CHOICE and "capacity" in given:
        capacity = int(given.pop("capacity"))
        given = {"top_k": capacity, **given}
    elif router == "promoe_ec" and "top_k" in given:  # as its publication calls the capacity
        top_k = float(given.pop("top_k"))
        given = {"capacity": top_k, **given}
    read, assumed = read_sizes(state, router)
    assumed = {key: value for key, value in assumed.items() if key not in given}
    if "num_heads" not in {**given, **read, **assumed}:
        raise CheckpointError(f"num_heads of width {read['width']} cannot be read from the tensors: give num_heads")
    if given.get("num_classes") == read.get("num_classes", -1) + 1:  # a table without a row for "no class"
        given["class_dropout"] = False
    time = {
        "time_scale": convention.time_scale,
        "time_shift": convention.time_shift,
        "prediction": convention.prediction,
    }
    try:
        return ModelConfig(**{"router": router, **time, **read, **assumed, **given}), assumed
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "sizes"
        raise CheckpointError(f"{where}: {first['msg']}; mend the sizes given for router {router}") from error


def _name(source: str | Path | Mapping[str, Any]) -> str:
    return "state dict" if isinstance(source, Mapping) else str(source)
