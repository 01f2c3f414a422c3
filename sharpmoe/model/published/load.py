"""Published checkpoints as models of this project: names, sizes and time convention resolved, every key used."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.families import FAMILIES
from sharpmoe.model.attach import extend_to_text
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.published.names import (
    CONVENTIONS,
    POSITIONS,
    ROUTERS,
    SPELLINGS,
    CheckpointFamily,
    Convention,
    convert_published,
)
from sharpmoe.model.published.read import read_state
from sharpmoe.model.published.sizes import matching_families, read_sizes
from sharpmoe.model.weights import OTHER_WEIGHTS, check_finite, copy_state

_TABLE = "pos_embed"  # the buffer of fixed positions, in our names and in published ones


class PretrainedReport(NamedTuple):
    """How the keys of a published checkpoint were used. Unmatched keys are an error, so they have no field."""

    loaded: tuple[str, ...]  # keys of the model that the checkpoint has
    new: tuple[str, ...]  # keys of the model that it lacks: freshly attached saliency routers
    assumed: dict[str, Any]  # fields that neither its tensors nor the caller determine

    def line(self) -> str:
        """Return a one-line summary."""
        assumed = ", ".join(f"{key} {value}" for key, value in self.assumed.items())
        summary = f"{len(self.loaded)} loaded, {len(self.new)} new, 0 unmatched"
        return summary + (f"; assumed: {assumed}" if assumed else "")


def load_pretrained(
    source: str | Path | Mapping[str, Any],
    family: CheckpointFamily,
    router: str,
    *,
    conditioning: Literal["class", "text"] = "class",
    weights: Literal["ema", "model"] = "ema",
    **sizes: Any,
) -> Backbone:
    """Build the model of a published checkpoint in our convention: v = model(x_t, t, labels).v, t = 0 data, 1 noise.

    source: .pth/.pt (read with weights_only), .safetensors, a folder of shards, or a state dict. family and router name
    its publication, since key names coincide. sizes: any field of `ModelConfig` (latent_size, depth, width, num_heads,
    num_experts, capacity, num_classes, top_k, saliency_router, ...), also in published spelling; a size that is not
    given is read from the tensors, or, where they do not determine it, assumed as published and logged. capacity of a
    token-choice family is its top_k. conditioning "text" extends a class-conditional trunk: see
    `sharpmoe.model.attach`.
    Returns float32 in eval mode. Raises CheckpointError for a file that cannot be read, unknown names, a key without a
    counterpart, or a size that is neither given nor known.
    """
    model, report = read_pretrained(source, family, router, weights=weights, **sizes)
    logging.getLogger(__name__).info("%s: %s", _name(source), report.line())
    if conditioning == "text" and model.config.conditioning == "class":
        model = extend_to_text(model, **{key: sizes[key] for key in ("text_width", "pooled_width") if key in sizes})
    return model


def read_pretrained(
    source: str | Path | Mapping[str, Any], family: CheckpointFamily, router: str, *, weights: str = "ema", **sizes: Any
) -> tuple[Backbone, PretrainedReport]:
    """Build the model as `load_pretrained` does, without extending it to text; return it with a report of its keys."""
    if family not in ROUTERS or router not in ROUTERS[family]:
        known = "; ".join(f"{name}: {', '.join(routers)}" for name, routers in ROUTERS.items())
        raise CheckpointError(f"family {family!r} has no router {router!r}; known are {known}")
    state = read_state(source, weights)
    _check_names(state, family, router, _name(source))
    return build_published(state, CONVENTIONS[family], router, _name(source), POSITIONS[family], **sizes)


def _check_names(state: Mapping[str, Tensor], family: CheckpointFamily, router: str, where: str) -> None:
    """Raise CheckpointError where the key names of a state dict are those of other families or routers."""
    candidates = matching_families(state)
    if candidates and (family, router) not in candidates:
        known = ", ".join("/".join(pair) for pair in candidates)
        raise CheckpointError(
            f"{where}: its key names are not those of family {family} with router {router}; they fit {known}; name one "
            "of these (--family, --router)"
        )


def build_published(
    state: Mapping[str, Tensor], convention: Convention, router: str, where: str, absent_positions: str, **sizes: Any
) -> tuple[Backbone, PretrainedReport]:
    """Build the model of a published state dict under any convention, in eval mode. CheckpointError names `where`.

    absent_positions: the kind of positions (`POSITIONS`) where the state dict holds no table; a fixed one is computed.
    """
    config, assumed = _published_config(state, convention, router, absent_positions, sizes)
    model = build_model(config)
    for name, value in state.items():
        check_finite(name, value, where, OTHER_WEIGHTS)
    converted = convert_published(state, convention)
    computed = {_TABLE: model.get_buffer(_TABLE)} if config.positions == "sincos" and _TABLE not in converted else {}
    new = copy_state(model, converted | computed, where)
    loaded = tuple(key for key in model.state_dict() if key not in (*new, *computed))
    return model.eval(), PretrainedReport(loaded, new, assumed)


def _published_config(
    state: Mapping[str, Tensor], convention: Convention, router: str, absent_positions: str, sizes: Mapping[str, Any]
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
    read, assumed = read_sizes(state, router, absent_positions)
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
        raise CheckpointError(f"{where}: {first['msg']}; correct the sizes given for router {router}") from error


def _name(source: str | Path | Mapping[str, Any]) -> str:
    return "state dict" if isinstance(source, Mapping) else str(source)
