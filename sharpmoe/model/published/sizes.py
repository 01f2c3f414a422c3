"""Read the architecture of a published checkpoint from its tensors, and find the families whose key names it has."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.published.names import CONVENTIONS, CheckpointFamily, convert_published

_NUM_HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16, 1408: 16}  # by width, of every published size


class PublishedSizes(NamedTuple):
    """Fields of `ModelConfig` for a published checkpoint."""

    read: dict[str, Any]  # from the tensors
    assumed: dict[str, Any]  # that tensors do not determine: the published value for this width or family


def read_sizes(state: Mapping[str, Tensor], router: str, positions: str) -> PublishedSizes:
    """Read width, depth, experts and other fields from a published state dict. CheckpointError on a missing key.

    positions: of the family (`POSITIONS`), where the state dict holds no table of them.
    """
    ours = convert_published(state, CONVENTIONS["promoe"])  # the sign of a velocity has no size
    for key in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"):
        if key not in ours:
            raise CheckpointError(f"key {key} is missing: not a diffusion transformer of a published family")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    out_features = ours["final_layer.linear.weight"].shape[0]
    blocks = sorted({int(key.split(".")[1]) for key in ours if key.startswith("blocks.")})
    depth = blocks[-1] + 1 if blocks else 0
    read = {
        "width": width,
        "latent_channels": channels,
        "patch_size": patch,
        "depth": depth,
        "learn_sigma": out_features == 2 * channels * patch**2,
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in ours else "layernorm",
        "saliency_router": any(".saliency_router." in key for key in ours),
        **_read_condition(ours),
        **_read_dense(ours, width),
        **(_read_experts(ours, router, depth) if router != "dense" else {}),
    }
    if router in ("promoe_tc", "promoe_ec") and read["unconditional_expert"] and read.get("num_classes") != 1000:
        read["unconditional_label"] = 1000  # their code compares with 1000, whatever the length of the label table
    assumed: dict[str, Any] = {}
    if "pos_embed" in ours:
        read |= {"positions": "sincos", "latent_size": round(ours["pos_embed"].shape[1] ** 0.5) * patch}
    else:
        assumed |= {"positions": positions, "latent_size": 32}
    if "blocks.0.attn.q_norm.weight" in ours:
        read |= {"qk_norm": True, "num_heads": width // ours["blocks.0.attn.q_norm.weight"].shape[0]}
        read["qk_norm_eps"] = 1e-6 if "blocks.0.attn.Wqkv.weight" in state else 1e-5
    elif width in _NUM_HEADS:
        assumed["num_heads"] = _NUM_HEADS[width]
    if router == "dsmoe" and read.get("num_experts") == 48:  # the published runs with 48 experts
        assumed |= {"top_k": 5, "routed_scale": 2.5}
    return PublishedSizes(read, assumed)


def _read_condition(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    if "text_embedder.tokens.0.weight" in ours:
        tokens, pooled = ours["text_embedder.tokens.0.weight"], ours["text_embedder.pooled.0.weight"]
        return {"conditioning": "text", "text_width": tokens.shape[1], "pooled_width": pooled.shape[1]}
    if "y_embedder.table.weight" not in ours:
        raise CheckpointError("key y_embedder.embedding_table.weight is missing: neither class- nor text-conditional")
    return {"conditioning": "class", "num_classes": ours["y_embedder.table.weight"].shape[0] - 1}


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


def matching_families(state: Mapping[str, Tensor]) -> list[tuple[CheckpointFamily, str]]:
    """Return the (family, router) pairs whose key names a state dict has; often several, as key names coincide."""
    keys = "\n".join(state)
    if ".moe.experts." in keys:
        return [("dit_moe", "dit_moe"), ("dit", "dit_moe")]
    if ".experts.blocks." in keys:
        return [("dsmoe", "dsmoe")]
    if "cluster_centers" in keys:
        return [("promoe", "promoe_tc"), ("promoe", "promoe_ec")]
    for part, router in (("capacity_predictor", "diffmoe"), ("gate_weight", "ec"), ("mlp.gate.weight", "tc")):
        if part in keys:
            return [("promoe", router), ("kwai", router), ("dsmoe", router)]
    if "blocks.0.mlp." not in keys:
        return []
    return [("promoe", "dense"), ("kwai", "dense"), ("sit", "dense"), ("dit", "dense"), ("dsmoe", "dense")]
