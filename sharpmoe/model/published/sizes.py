"""Read the architecture of a published checkpoint from its tensors, and find the families whose key names it has."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.published.names import (
    CONVENTIONS,
    CheckpointFamily,
    PublishedDefaults,
    convert_published,
)

_NUM_HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16, 1408: 16}  # by width, of every published size
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class PublishedSizes(NamedTuple):
    """Fields of `ModelConfig` for a published checkpoint."""

    read: dict[str, Any]  # from the tensors
    assumed: dict[str, Any]  # that tensors do not determine: the published value for this width or family


def read_sizes(
    state: Mapping[str, Tensor], router: str, defaults: PublishedDefaults, num_classes: int | None = None
) -> PublishedSizes:
    """Read width, depth, experts and other fields from a published state dict. CheckpointError on a missing key.

    defaults: of the family, for what the state dict leaves out. num_classes: where the caller knows it.
    """
    ours = convert_published(state, CONVENTIONS["promoe"])  # the sign of a velocity has no size
    for key in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"):
        if key not in ours:
            raise CheckpointError(f"key {key} is missing: not a diffusion transformer of a published family")
    embedder = state["x_embedder.proj.weight"].shape
    if len(embedder) != 4:
        raise CheckpointError(
            f"x_embedder.proj.weight has shape {tuple(embedder)}, expected (width, channels, patch, patch): not a "
            "published family"
        )
    width, channels, patch, _ = embedder
    out_features = ours["final_layer.linear.weight"].shape[0]
    outputs, rest = divmod(out_features, channels * patch**2)
    if rest or outputs not in (1, 2):
        raise CheckpointError(
            f"final_layer.linear.weight gives {out_features} numbers per patch, expected {channels * patch**2} for "
            f"{channels} channels, or twice as many with a learned variance: not a published family"
        )
    blocks = [int(found[1]) for found in map(_BLOCK.match, ours) if found]
    depth = max(blocks, default=-1) + 1
    condition = _read_condition(ours, defaults, num_classes)
    read = {
        "width": width,
        "latent_channels": channels,
        "patch_size": patch,
        "depth": depth,
        "learn_sigma": outputs == 2,
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in ours else "layernorm",
        "saliency_router": any(".saliency_router." in key for key in ours),
        **condition.read,
        **_read_dense(ours, width),
        **(_read_experts(ours, router, depth) if router != "dense" else {}),
    }
    if router in ("promoe_tc", "promoe_ec") and read["unconditional_expert"] and read.get("num_classes") != 1000:
        read["unconditional_label"] = 1000  # their code compares with 1000, whatever the length of the label table
    assumed = dict(condition.assumed)
    if "pos_embed" in ours:
        read |= {"positions": "sincos", "latent_size": _grid_of(ours["pos_embed"], width) * patch}
    else:
        assumed |= {"positions": defaults.positions, "latent_size": defaults.latent_size}
    if "blocks.0.attn.q_norm.weight" in ours:
        read |= {"qk_norm": True, "num_heads": width // ours["blocks.0.attn.q_norm.weight"].shape[0]}
        read["qk_norm_eps"] = 1e-6 if "blocks.0.attn.Wqkv.weight" in state else 1e-5
    elif width in _NUM_HEADS:
        assumed["num_heads"] = _NUM_HEADS[width]
    if router == "dsmoe" and read.get("num_experts") == 48:  # the published runs with 48 experts
        assumed |= {"top_k": 5, "routed_scale": 2.5}
    return PublishedSizes(read, assumed)


def _read_condition(ours: Mapping[str, Tensor], defaults: PublishedDefaults, num_classes: int | None) -> PublishedSizes:
    if "text_embedder.tokens.0.weight" in ours:
        tokens, pooled = ours["text_embedder.tokens.0.weight"], ours["text_embedder.pooled.0.weight"]
        widths = {"text_width": tokens.shape[1], "pooled_width": pooled.shape[1]}
        return PublishedSizes({"conditioning": "text", **widths}, {})
    if "y_embedder.table.weight" not in ours:
        raise CheckpointError("key y_embedder.embedding_table.weight is missing: neither class- nor text-conditional")
    rows, classes = ours["y_embedder.table.weight"].shape[0], num_classes or defaults.num_classes
    read: dict[str, Any] = {"conditioning": "class"}
    if rows - classes in (0, 1):
        return PublishedSizes(read | {"num_classes": classes, "class_dropout": rows == classes + 1}, {})
    if num_classes is not None:
        raise CheckpointError(
            f"the label table has {rows} rows, but num_classes is {num_classes}: it needs {num_classes} rows, or one "
            f'more for "no class"; give num_classes {rows - 1} or {rows}'
        )
    assumed = {"num_classes": rows - defaults.class_dropout, "class_dropout": defaults.class_dropout}
    return PublishedSizes(read, assumed)


def _grid_of(table: Tensor, width: int) -> int:
    """Return the side of the square token grid of a table of positions (1, side side, width)."""
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if side**2 != table.numel() // width or table.shape[-1] != width:
        raise CheckpointError(
            f"pos_embed has shape {tuple(table.shape)}, expected (1, N, {width}) with N tokens of a square grid"
        )
    return side


def _read_dense(ours: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    for key, value in ours.items():
        if key.endswith(".mlp.gate_proj.weight"):
            return {"mlp": "swiglu", "mlp_ratio": value.shape[0] / width}
        if key.endswith(".mlp.fc1.weight"):
            return {"mlp_ratio": value.shape[0] / width}
    return {}


def _read_experts(ours: Mapping[str, Tensor], router: str, depth: int) -> dict[str, Any]:
    layers = sorted(int(key.split(".")[1]) for key in ours if key.endswith(".moe.experts.w1"))
    if not layers:
        raise CheckpointError(f"router {router} was named, but the checkpoint holds no experts; name router dense")
    layer = f"blocks.{layers[0]}.moe"
    gate = ours.get(f"{layer}.gate.weight")
    if gate is None:
        raise CheckpointError(f"router {router} was named, but {layer} has no gate: another router family")
    w1, w3 = ours[f"{layer}.experts.w1"], ours[f"{layer}.experts.w3"]
    read = {
        "num_experts": gate.shape[0],
        "unconditional_expert": w1.shape[0] > gate.shape[0],
        "expert": "gelu" if w3.shape[1] == 1 else "swiglu",
        "expert_hidden": w1.shape[1],
        "bias_balancing": f"{layer}.expert_bias" in ours,
        "shared": "identity" if router == "dsmoe" else "none",
        **_read_places(layers, depth),
    }
    for part, kind in (("gate_proj", "swiglu"), ("fc1", "gelu")):
        if f"{layer}.shared.{part}.weight" in ours:
            read |= {"shared": kind, "shared_hidden": ours[f"{layer}.shared.{part}.weight"].shape[0]}
    return read


def _read_places(layers: Sequence[int], depth: int) -> dict[str, int]:
    for every in (2, 1, 3, 4):
        in_turn = [block for block in range(depth) if block % every == every - 1]
        for first in range(depth):
            if [block for block in in_turn if block >= first] == list(layers):
                return {"moe_every": every, "dense_first": first}
    raise CheckpointError(
        f"MoE layers are in blocks {', '.join(map(str, layers))}: not a pattern of a published family"
    )


_GATED: dict[str, str] = {  # part of a key that only models of one router have
    "capacity_predictor": "diffmoe",
    "gate_weight": "ec",
    "mlp.gate.weight": "tc",
}
_SIGNS: dict[str, list[tuple[CheckpointFamily, str]]] = {  # part of a key -> whose it is; the first that fits decides
    ".moe.experts.": [("dit_moe", "dit_moe"), ("dit", "dit_moe")],
    ".experts.blocks.": [("dsmoe", "dsmoe")],
    "cluster_centers": [("promoe", "promoe_tc"), ("promoe", "promoe_ec")],
    **{part: [("promoe", router), ("kwai", router), ("dsmoe", router)] for part, router in _GATED.items()},
    "blocks.0.mlp.": [(family, "dense") for family in ("promoe", "kwai", "sit", "dit", "dsmoe")],
}


def matching_families(state: Mapping[str, Tensor]) -> list[tuple[CheckpointFamily, str]]:
    """Return the (family, router) pairs whose key names a state dict has; often several, as key names coincide."""
    return next((pairs for part, pairs in _SIGNS.items() if _key_with(part, state)), [])


def check_router(state: Mapping[str, Tensor], family: str, router: str, where: str) -> None:
    """Raise CheckpointError where a state dict cannot be of this family and router: it has keys that only others have.

    Key names that no family has are left to `read_sizes`, which names what is missing.
    """
    for part, pairs in _SIGNS.items():
        key = _key_with(part, state)
        if key is None:
            continue
        if (family, router) not in pairs:
            known = ", ".join(f"{one}/{other}" for one, other in pairs)
            raise CheckpointError(
                f"{where}: it cannot be of family {family} with router {router}: its key {key} and the others fit "
                f"{known}; name one of these (--family, --router)"
            )
        return


def _key_with(part: str, state: Mapping[str, Tensor]) -> str | None:
    return next((key for key in state if part in key), None)
