"""Weights files of ours, and published checkpoints: key maps and time conventions live here and nowhere else."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.dit import DiT

FORMAT = "sharpmoe-1"
NEW_ALLOWED = ("saliency_router",)  # parts a base checkpoint may lack: they start as an identity


class LoadReport(NamedTuple):
    """What a weights file gave to a model."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]  # keys of the model that the file lacks: freshly attached saliency routers
    meta: dict[str, str]


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, meta: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as safetensors with the architecture and `meta` in its header; atomic (rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "model": config.model_dump_json(), **(meta or {})}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, partial, metadata=header)
    os.replace(partial, path)


def stored_as(state: Mapping[str, Tensor], model: DiT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a state dict with the parameters of `model` in `dtype`, for a smaller file; buffers stay float32."""
    parameters = {name for name, _ in model.named_parameters()}
    return {key: value.to(dtype) if key in parameters else value for key, value in state.items()}


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, str]]:
    """Read a weights file of ours: tensors, architecture, meta. CheckpointError names what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file; give the path of a .safetensors written by this project")
    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
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
    return state, config, {key: value for key, value in meta.items() if key not in ("format", "model")}


def load_model(path: str | Path) -> tuple[DiT, dict[str, str]]:
    """Build the model that a weights file holds, float32, in eval mode, with the file's meta."""
    state, config, meta = read_weights(path)
    model = DiT(config)
    copy_state(model, state, str(path))
    return model.eval(), meta


def load_into(model: DiT, path: str | Path) -> LoadReport:
    """Load a weights file into a model of the same architecture; only saliency routers may be new.

    Raises CheckpointError naming the first field of the architecture, or the first key, that differs.
    """
    state, config, meta = read_weights(path)
    check_architecture(config, model.config, str(path))
    missing = copy_state(model, state, str(path))
    return LoadReport(tuple(state), missing, meta)


def check_architecture(found: ModelConfig, expected: ModelConfig, where: str) -> None:
    """Raise CheckpointError on the first architectural field that differs (a new saliency router is not one)."""
    free = {"preset", "saliency_router", "capacity_selection"}
    for field in ModelConfig.model_fields:
        have, want = getattr(found, field), getattr(expected, field)
        if field not in free and have != want:
            raise CheckpointError(
                f"{where}: model.{field} is {have!r} there, {want!r} in the run; "
                f"set model.{field} to {have!r} or use other weights"
            )


def copy_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Copy a state dict into a model; returns the keys that were new. CheckpointError on any other mismatch."""
    own = model.state_dict()
    missing = tuple(key for key in own if key not in state)
    lost = [key for key in missing if not any(part in key for part in NEW_ALLOWED)]
    extra = [key for key in state if key not in own and not any(part in key for part in NEW_ALLOWED)]
    if lost or extra:
        key, what = (lost[0], "is missing") if lost else (extra[0], "is unknown")
        raise CheckpointError(
            f"{where}: key {key} {what} ({len(lost)} missing, {len(extra)} unknown): another architecture"
        )
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(own[key].shape)}"
            raise CheckpointError(f"{where}: key {key} has shape {shapes}: another architecture")
    with torch.no_grad():
        for key, value in state.items():
            if key in own:
                own[key].copy_(value)
    return missing


Family = Literal["promoe", "kwai"]

# The value each family feeds to its time embedder, as time_scale * t + time_shift of our t (0 = data).
TIME_CONVENTION: dict[str, tuple[float, float]] = {"promoe": (1000.0, 0.0), "kwai": (-1.0, 1.0)}

_RENAMED = {
    "adaLN_modulation.1": "modulation",
    "y_embedder.embedding_table": "y_embedder.table",
    "mlp.gate_weight": "moe.gate.weight",
    "mlp.gate.weight": "moe.gate.weight",
    "mlp.capacity_predictor.0": "moe.capacity_predictor.hidden",
    "mlp.capacity_predictor.2": "moe.capacity_predictor.out",
    "mlp.expert_threshold": "moe.expert_threshold",
}


def convert_published(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Rename a published TC/EC/DiffMoE/dense DiT state dict to our keys and our direction of time.

    The key names of these families coincide while their conventions differ, so the family must be named. A family that
    predicts x0 - x1 gets its final layer negated; its time goes into the architecture (`TIME_CONVENTION`).
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, value in state.items():
        if key.endswith("ema_decay"):
            continue  # a constant of their training, ours is optim.threshold_decay
        if ".experts." in key:
            layer, rest = key.split(".mlp.experts.")
            index, name = rest.split(".", 1)
            experts.setdefault(layer, {})[int(index), name] = value
            continue
        for old, new in _RENAMED.items():
            key = key.replace(old, new)
        converted[key] = value.flatten(1) if key == "x_embedder.proj.weight" else value
    for layer, parts in experts.items():
        converted.update(_stack_experts(f"{layer}.moe.experts", parts))
    if family == "kwai":
        for name in ("weight", "bias"):
            converted[f"final_layer.linear.{name}"] = -converted[f"final_layer.linear.{name}"]
    return converted


def _stack_experts(prefix: str, parts: Mapping[tuple[int, str], Tensor]) -> dict[str, Tensor]:
    count = 1 + max(index for index, _ in parts)

    def stacked(name: str) -> Tensor:
        return torch.stack([parts[expert, name] for expert in range(count)])

    biases = torch.cat([stacked("fc1.bias"), stacked("fc2.bias")], dim=-1).unsqueeze(1)
    return {f"{prefix}.w1": stacked("fc1.weight"), f"{prefix}.w2": stacked("fc2.weight"), f"{prefix}.w3": biases}


def to_published(state: Mapping[str, Tensor], config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Invert `convert_published`: our state dict (or gradients by our keys) under a family's key names."""
    gate = "mlp.gate.weight" if config.router == "tc" else "mlp.gate_weight"
    renamed = {new: old for old, new in _RENAMED.items()} | {"moe.gate.weight": gate}
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".moe.experts." in key:
            published.update(_unstack_experts(key, value, int(config.width * config.mlp_ratio)))
            continue
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        if key == "x_embedder.proj.weight":
            value = value.unflatten(1, (config.latent_channels, config.patch_size, config.patch_size))
        if family == "kwai" and key.startswith("final_layer.linear."):
            value = -value
        published[key] = value
    return published


def _unstack_experts(key: str, value: Tensor, hidden: int) -> dict[str, Tensor]:
    layer, name = key.split(".moe.experts.")
    parts: dict[str, Tensor] = {}
    for expert, one in enumerate(value.unbind()):
        prefix = f"{layer}.mlp.experts.{expert}"
        if name == "w3":
            parts[f"{prefix}.fc1.bias"], parts[f"{prefix}.fc2.bias"] = one[0, :hidden], one[0, hidden:]
        else:
            parts[f"{prefix}.{'fc1' if name == 'w1' else 'fc2'}.weight"] = one
    return parts
