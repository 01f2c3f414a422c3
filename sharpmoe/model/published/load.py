"""Published checkpoints as models of this project: names, sizes and time convention resolved, every key used."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.families import FAMILIES
from sharpmoe.model.attach import extend_to_text
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.embed import sincos_positions
from sharpmoe.model.published.folder import PublishedFolder, local_folder
from sharpmoe.model.published.names import (
    CONVENTIONS,
    DEFAULTS,
    ROUTERS,
    SPELLINGS,
    CheckpointFamily,
    Convention,
    PublishedDefaults,
    convert_published,
    is_constant,
)
from sharpmoe.model.published.read import WeightsKind, read_state, refuse_own
from sharpmoe.model.published.sizes import check_router, read_sizes
from sharpmoe.model.weights import OTHER_WEIGHTS, build_from_folder, check_finite, copy_state

_TABLE = "pos_embed"  # the buffer of fixed positions, in our names and in published ones
_TABLE_ERROR = 2e-3  # a table saved in half precision differs so much from the sines and cosines that it holds
_NAMED = 3  # names of a list that a report prints


@dataclass(frozen=True, kw_only=True)
class PretrainedReport:
    """How the keys of a published checkpoint were used. Unmatched keys are an error, so they have no field."""

    loaded: tuple[str, ...]  # parameters and buffers of the model that the checkpoint has
    new: tuple[str, ...]  # parameters that it lacks: they have initial values
    computed: tuple[str, ...]  # buffers that it lacks, or that were computed for another size
    unused: tuple[str, ...]  # tensors of the checkpoint that the model has no place for
    assumed: Mapping[str, Any]  # fields that neither its tensors nor the caller determine
    kind: str = "plain"  # which weights were read: see `PublishedState`
    notes: tuple[str, ...] = ()  # how the tensors were found in the file
    counts: Mapping[str, int] = field(default_factory=dict)  # numbers in every parameter of the model, by name

    def line(self) -> str:
        """Return a one-line summary."""
        summary = f"{len(self.loaded)} loaded, {len(self.new)} new, 0 unmatched"
        return summary + (f"; assumed: {self._assumed()}" if self.assumed else "")

    def lines(self) -> list[str]:
        """Return the report as lines of a name and what it says, for people."""
        parameters = [name for name in self.loaded if name in self.counts]
        buffers = [name for name in self.loaded if name not in self.counts]
        rows = {
            "read": "; ".join(self.notes),
            "loaded": f"{self._size(parameters)}, and {_listed(buffers, 'buffer')}",
            "new": f"{self._size(self.new)}{' with initial values: ' + _named(self.new) if self.new else ''}",
            "computed": _listed(self.computed, "buffer") if self.computed else "",
            "unused": _listed(self.unused, "tensor of the file", "tensors of the file"),
            "assumed": self._assumed(),
        }
        return [f"{name:<12}{text}" for name, text in rows.items() if text]

    def _assumed(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.assumed.items())

    def _size(self, names: Sequence[str]) -> str:
        sizes = [self.counts[name] for name in names]
        return f"{_count(len(sizes), 'parameter tensor')} ({sum(sizes) / 1e6:.3f} million)"


def _listed(names: Sequence[str], one: str, several: str = "") -> str:
    return _count(len(names), one, several) + (f": {_named(names)}" if names else "")


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def describe(model: Backbone) -> list[str]:
    """Return lines on architecture and parameters of a converted model, and on what a run adds to it."""
    config, (total, active) = model.config, model.count_parameters()
    experts = f", {config.num_experts} experts" if config.family.has_experts else ""
    latents = f"{config.latent_channels} x {config.latent_size} x {config.latent_size}"
    lines = [
        f"model       {config.router}: {config.width}/{config.depth}/{config.num_heads}{experts}, latents {latents}",
        f"parameters  {total / 1e6:.3f} million, {active / 1e6:.3f} million active per token",
    ]
    if config.family.has_experts and not config.saliency_router:
        with torch.device("meta"):
            larger, _ = build_model(config.model_copy(update={"saliency_router": True})).count_parameters()
        lines.append(f"in a run    {(larger - total) / 1e6:.3f} million new parameters: saliency routers")
    return lines


def load_pretrained(
    source: str | Path | Mapping[str, Any],
    family: CheckpointFamily,
    router: str | None = None,
    *,
    conditioning: Literal["class", "text"] = "class",
    weights: WeightsKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> Backbone:
    """Build the model of a published checkpoint in our convention: v = model(x_t, t, labels).v, t = 0 data, 1 noise.

    source: .pth/.pt (read with weights_only), .safetensors, a folder of shards, or a state dict; of family "nucleus"
    the folder of the pipeline or of its transformer, or its name on the Hub, which is read tensor by tensor. family and
    router name its publication, since key names coincide; the router may be left out where a family has one. weights:
    averaged ("ema") or live ("model") ones of a training checkpoint; None takes averaged ones where there are any.
    sizes: any field of `ModelConfig` (depth, width, num_heads, num_experts, capacity, num_classes, top_k,
    saliency_router, ...), also in published spelling; a size that is not given is read from config.json or the tensors,
    or, where they do not determine it, assumed as published and logged. capacity of a token-choice family is its top_k.
    Another latent_size than the file's positions have is a request for positions of that size (docs/design/0005).
    conditioning "text" extends a class-conditional trunk: see `sharpmoe.model.attach`.
    Returns the model in eval mode, parameters in `dtype` on `device`. What says itself what it is, a model of this
    project or a whole Nucleus-Image, is loaded by `sharpmoe.load`. Raises CheckpointError for a file that cannot be
    read, unknown names, a key without a counterpart, or a size that is neither given nor known.
    """
    model, report = read_pretrained(
        source, family, router, conditioning=conditioning, weights=weights, device=device, dtype=dtype, **sizes
    )
    logging.getLogger(__name__).info("%s: %s", _name(source), report.line())
    return model


def read_pretrained(
    source: str | Path | Mapping[str, Any],
    family: CheckpointFamily,
    router: str | None = None,
    *,
    conditioning: Literal["class", "text"] = "class",
    weights: WeightsKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> tuple[Backbone, PretrainedReport]:
    """Build the model as `load_pretrained` does; return it with a report of its keys."""
    router = _router_of(family, router)
    if family not in CONVENTIONS:
        return _read_folder(source, torch.device(device), dtype, sizes)
    found = read_state(source, weights)
    check_router(found.tensors, family, router, _name(source))
    model, report = build_published(
        found.tensors, CONVENTIONS[family], router, _name(source), DEFAULTS[family], **sizes
    )
    report = replace(report, kind=found.kind, notes=found.notes)
    if conditioning == "text" and model.config.conditioning == "class":
        trunk = set(model.state_dict())
        model = extend_to_text(model, **{key: sizes[key] for key in ("text_width", "pooled_width") if key in sizes})
        added = tuple(name for name, _ in model.named_parameters() if name not in trunk)
        lost = tuple(trunk - set(model.state_dict()))
        report = replace(
            report,
            loaded=tuple(name for name in report.loaded if name not in lost),
            new=report.new + added,
            unused=report.unused + lost,
            counts=_counts(model),
        )
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model, report


def _router_of(family: str, router: str | None) -> str:
    """Return the router of a family. Raises CheckpointError where there is none of this name, or several to choose."""
    routers = ROUTERS.get(family, ())
    if router is None and len(routers) == 1:
        return routers[0]
    if router not in routers:
        known = "; ".join(f"{name}: {', '.join(routers)}" for name, routers in ROUTERS.items())
        given = f"{router!r}" if router is not None else "that could be left out: name one"
        raise CheckpointError(f"family {family!r} has no router {given}; known are {known}")
    return router


def _read_folder(
    source: str | Path | Mapping[str, Any], device: torch.device, dtype: torch.dtype, sizes: Mapping[str, Any]
) -> tuple[Backbone, PretrainedReport]:
    """Build the model of a folder with a configuration; return it with a report of its keys."""
    if isinstance(source, Mapping):
        raise CheckpointError("state dict: this family is read from a folder with config.json; give the folder")
    given = {SPELLINGS.get(key, key): value for key, value in sizes.items() if value is not None}
    place = local_folder(source)
    refuse_own(place)
    folder = PublishedFolder(place, **given)
    model = build_from_folder(folder, device, dtype)
    report = PretrainedReport(
        loaded=tuple(name for name in model.state_dict() if name in folder.names),
        new=tuple(name for name, _ in model.named_parameters() if name not in folder.names),
        computed=(),
        unused=(),
        assumed={},
        notes=(f"{folder.path}: {folder.dtype}".replace("torch.", ""),),
        counts=_counts(model),
    )
    return model, report


def build_published(
    state: Mapping[str, Tensor],
    convention: Convention,
    router: str,
    where: str,
    defaults: PublishedDefaults,
    **sizes: Any,
) -> tuple[Backbone, PretrainedReport]:
    """Build the model of a published state dict under any convention, in eval mode. CheckpointError names `where`.

    defaults: what the family says of what the state dict leaves out; fixed positions are computed.
    """
    try:
        config, assumed = _published_config(state, convention, router, defaults, sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    model = build_model(config)
    for name, value in state.items():
        check_finite(name, value, where, OTHER_WEIGHTS)
    converted = convert_published(state, convention)
    computed = _computed_table(model, converted.get(_TABLE))
    new = copy_state(model, converted | computed, where)
    own = model.state_dict()
    report = PretrainedReport(
        loaded=tuple(key for key in own if key not in (*new, *computed)),
        new=new,
        computed=tuple(computed),
        unused=tuple(key for key in state if is_constant(key)) + tuple(key for key in converted if key not in own),
        assumed=assumed,
        counts=_counts(model),
    )
    return model.eval(), report


def _counts(model: Backbone) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _computed_table(model: Backbone, table: Tensor | None) -> dict[str, Tensor]:
    """Return the table of positions under its key where that of the file is missing or of another size."""
    if model.config.positions != "sincos" or (table is not None and table.shape[1] == model.config.num_tokens):
        return {}
    own = model.get_buffer(_TABLE)
    return {_TABLE: own if table is None else _positions_for(model.config, table)}


def _positions_for(config: ModelConfig, table: Tensor) -> Tensor:
    """Return positions (1, N, D) of the model's size from a checkpoint's table (1, M, D) of another one.

    A table of sines and cosines is computed anew for the new size, as the families' own code does: neighbours keep
    their distance, and grids of other aspects (`sincos_positions`) agree with it. A learned one is interpolated
    (bicubic).
    """
    width, side = config.width, config.latent_size // config.patch_size
    old = math.isqrt(table.shape[1])
    if (table.float() - sincos_positions(width, (old, old), old)).abs().max() < _TABLE_ERROR:
        return sincos_positions(width, (side, side), side)
    grid = table.float().reshape(1, old, old, width).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, side * side, width)


def _published_config(
    state: Mapping[str, Tensor],
    convention: Convention,
    router: str,
    defaults: PublishedDefaults,
    sizes: Mapping[str, Any],
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the architecture of a published state dict and the fields that were assumed. Raises CheckpointError."""
    given = {SPELLINGS.get(key, key): value for key, value in sizes.items() if value is not None}
    if "rope_type" in given:
        kind = str(given.pop("rope_type"))
        given["positions"] = "sincos" if kind == "none" else f"rope_{kind}"
    if not FAMILIES[router].has_experts:
        given = {key: value for key, value in given.items() if key not in ("num_experts", "capacity", "top_k")}
    elif FAMILIES[router].competition == "token" and "capacity" in given:
        capacity = int(given.pop("capacity"))
        given = {"top_k": capacity, **given}
    elif router == "promoe_ec" and "top_k" in given:  # as its publication calls the capacity
        top_k = float(given.pop("top_k"))
        given = {"capacity": top_k, **given}
    if "class_dropout" in given:
        defaults = defaults._replace(class_dropout=bool(given["class_dropout"]))
    read, assumed = read_sizes(state, router, defaults, given.get("num_classes"))
    assumed = {key: value for key, value in assumed.items() if key not in given}
    if "num_heads" not in {**given, **read, **assumed}:
        raise CheckpointError(f"num_heads of width {read['width']} cannot be read from the tensors: give num_heads")
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
        raise CheckpointError(f"{where}: {first['msg']}; correct the sizes given for router {router}") from error


def _name(source: str | Path | Mapping[str, Any]) -> str:
    return "state dict" if isinstance(source, Mapping) else str(source)
