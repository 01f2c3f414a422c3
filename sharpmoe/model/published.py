"""Published checkpoints: key names, time conventions and what sizes the tensors tell. They live here and nowhere else.

The key names of the families coincide while their conventions differ, so a family must be named; nothing here guesses
one. Names follow the public code of ProMoE, DiffMoE (Kwai), DSMoE, DiT-MoE (feizc), SiT and DiT.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError

Family = Literal["promoe", "kwai", "dsmoe", "dit_moe", "sit", "dit"]
FAMILIES: tuple[str, ...] = get_args(Family)


class Convention(NamedTuple):
    """How a family counts time and what it predicts, seen from our t (0 = data, 1 = noise)."""

    time_scale: float  # its time embedder is fed time_scale * t + time_shift
    time_shift: float
    sign: int  # of its velocity; -1 is data - noise, and the final layer is negated on the way in
    prediction: Literal["velocity", "ddpm_noise"]


CONVENTIONS: dict[str, Convention] = {
    "promoe": Convention(1000.0, 0.0, 1, "velocity"),
    "kwai": Convention(-1.0, 1.0, -1, "velocity"),
    "dsmoe": Convention(-1.0, 1.0, -1, "velocity"),
    "dit_moe": Convention(1.0, 0.0, 1, "velocity"),
    "sit": Convention(-1.0, 1.0, -1, "velocity"),
    "dit": Convention(1.0, 0.0, 1, "ddpm_noise"),  # fed the DDPM step that `flow.ddpm_input` finds
}
ROUTERS: dict[str, tuple[str, ...]] = {
    "promoe": ("dense", "tc", "ec", "diffmoe", "promoe_tc", "promoe_ec"),
    "kwai": ("dense", "tc", "ec", "diffmoe"),
    "dsmoe": ("dense", "tc", "ec", "diffmoe", "dsmoe"),
    "dit_moe": ("dit_moe",),
    "sit": ("dense",),
    "dit": ("dense", "dit_moe"),  # DiT-MoE S and B were trained as DDPMs, XL and G by rectified flow
}
NUM_HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16, 1408: 16}  # by width, of every published size
SPELLINGS = {  # published names of fields that are called otherwise here
    "hidden_size": "width",
    "input_size": "latent_size",
    "in_channels": "latent_channels",
    "num_experts_per_tok": "top_k",
    "num_routed_experts": "num_experts",
    "moe_intermediate_size": "expert_hidden",
    "shared_expert_intermediate_size": "shared_hidden",
    "n_group": "num_groups",
    "topk_group": "top_groups",
    "routed_scaling_factor": "routed_scale",
    "norm_topk_prob": "renormalise",
    "router_weight_mode": "score",
    "norm_type": "norm",
}


class Names(NamedTuple):
    """How one router family spells the parts of an MoE layer."""

    gate: str
    layer: str = "mlp"
    experts: str = "experts"
    shared: str = "shared_experts"
    inner: str = "fc1"  # of a gelu expert
    outer: str = "fc2"


_PROMOE = Names("cluster_centers", shared="shared_expert", inner="up_proj", outer="down_proj")
NAMES: dict[str, Names] = {
    "dense": Names("gate.weight"),
    "tc": Names("gate.weight"),
    "ec": Names("gate_weight"),
    "diffmoe": Names("gate_weight"),
    "race": Names("gate_weight"),
    "promoe_tc": _PROMOE,
    "promoe_ec": _PROMOE,
    "dsmoe": Names("gate.weight", experts="experts.blocks"),
    "dit_moe": Names("gate.weight", layer="moe"),
}
_RENAMED = {
    "adaLN_modulation.1": "modulation",
    "y_embedder.embedding_table": "y_embedder.table",
    "attn.Wqkv": "attn.qkv",  # feizc's flash attention
    "attn.out_proj": "attn.proj",
}
_IN_LAYER = {
    "gate_weight": "gate.weight",
    "cluster_centers": "gate.weight",
    "gate.e_score_correction_bias": "expert_bias",
    "capacity_predictor.0.weight": "capacity_predictor.hidden.weight",
    "capacity_predictor.0.bias": "capacity_predictor.hidden.bias",
    "capacity_predictor.2.weight": "capacity_predictor.out.weight",
    "capacity_predictor.2.bias": "capacity_predictor.out.bias",
}
_LAYER_KEY = re.compile(r"(blocks\.\d+)\.(?:mlp|moe)\.(.+)")
_EXPERT_KEY = re.compile(r"experts\.(?:blocks\.)?(\d+)\.(.+)")
_SHARED_KEY = re.compile(r"shared_experts?\.(.+)")
_DENSE_PARTS = ("fc1.", "fc2.", "gate_proj.", "up_proj.", "down_proj.")


def convert_published(state: Mapping[str, Tensor], convention: Convention) -> dict[str, Tensor]:
    """Rename a published state dict to our keys and our sign of the velocity; its time goes into the architecture.

    Under a convention that predicts data - noise the final layer is negated. Constants of their training (the decay of
    DiffMoE's thresholds) are left behind.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, value in state.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None or match[2].startswith(_DENSE_PARTS):
            converted[_plain_key(key)] = value.flatten(1) if key == "x_embedder.proj.weight" else value
        elif expert := _EXPERT_KEY.fullmatch(match[2]):
            experts.setdefault(match[1], {})[int(expert[1]), expert[2]] = value
        elif match[2] != "ema_decay":
            converted[f"{match[1]}.moe.{_layer_key(match[2], state, match[0])}"] = value
    for block, parts in experts.items():
        converted.update(_stack_experts(f"{block}.moe.experts", parts))
    if convention.sign < 0:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if name in converted:
                converted[name] = -converted[name]
    return converted


def _plain_key(key: str) -> str:
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key


def _layer_key(name: str, state: Mapping[str, Tensor], key: str) -> str:
    shared = _SHARED_KEY.fullmatch(name)
    if shared is None:
        return _IN_LAYER.get(name, name)
    gated = any(other.startswith(key[: -len(shared[1])] + "gate_proj.") for other in state)
    part = shared[1] if gated else shared[1].replace("up_proj.", "fc1.").replace("down_proj.", "fc2.")
    return f"shared.{part}"


def _stack_experts(prefix: str, parts: Mapping[tuple[int, str], Tensor]) -> dict[str, Tensor]:
    count = 1 + max(index for index, _ in parts)
    names = {name for _, name in parts}

    def stacked(name: str) -> Tensor:
        missing = [expert for expert in range(count) if (expert, name) not in parts]
        if missing:
            raise CheckpointError(
                f"{prefix}: expert {missing[0]} of {count} has no {name}; the checkpoint is not whole"
            )
        return torch.stack([parts[expert, name] for expert in range(count)])

    if "gate_proj.weight" in names:
        return {
            f"{prefix}.w1": stacked("gate_proj.weight"),
            f"{prefix}.w2": stacked("down_proj.weight"),
            f"{prefix}.w3": stacked("up_proj.weight"),
        }
    inner, outer = ("up_proj", "down_proj") if "up_proj.weight" in names else ("fc1", "fc2")
    biases = torch.cat([stacked(f"{inner}.bias"), stacked(f"{outer}.bias")], dim=-1).unsqueeze(1)
    weights = {f"{prefix}.w1": stacked(f"{inner}.weight"), f"{prefix}.w2": stacked(f"{outer}.weight")}
    return weights | {f"{prefix}.w3": biases}


def to_published(state: Mapping[str, Tensor], config: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Invert `convert_published`: our state dict (or gradients by our keys) under a family's key names.

    Raises CheckpointError where the model's time convention is not the family's: the weights would compute another
    function there.
    """
    convention = CONVENTIONS[family]
    if (config.time_scale, config.time_shift, config.prediction) != (*convention[:2], convention.prediction):
        raise CheckpointError(
            f"family {family} feeds its time embedder {_fed(convention)}, this model {_fed_by(config)}: "
            "its weights would compute another function there; name the family of its convention"
        )
    names = NAMES[config.router]
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is not None and ".moe." in key:
            published.update(_published_layer(f"{match[1]}.{names.layer}", match[2], value, config))
            continue
        for theirs, ours in list(_RENAMED.items())[:2]:
            key = key.replace(ours, theirs)
        if key == "x_embedder.proj.weight":
            value = value.unflatten(1, (config.latent_channels, config.patch_size, config.patch_size))
        published[key] = -value if convention.sign < 0 and key.startswith("final_layer.linear.") else value
    return published


def _published_layer(layer: str, name: str, value: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    names = NAMES[config.router]
    if name.startswith("experts."):
        return _unstack_experts(f"{layer}.{names.experts}", name.removeprefix("experts."), value, config)
    if name.startswith("shared."):
        part = name.removeprefix("shared.").replace("fc1.", f"{names.inner}.").replace("fc2.", f"{names.outer}.")
        return {f"{layer}.{names.shared}.{part}": value}
    if name == "gate.weight":
        return {f"{layer}.{names.gate}": value}
    theirs = {ours: old for old, ours in _IN_LAYER.items() if ours != "gate.weight"}
    return {f"{layer}.{theirs.get(name, name)}": value}


def _unstack_experts(prefix: str, name: str, value: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    names, hidden = NAMES[config.router], config.expert_width
    if config.expert == "swiglu":
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[name]
        return {f"{prefix}.{expert}.{part}.weight": one for expert, one in enumerate(value.unbind())}
    if name != "w3":
        part = names.inner if name == "w1" else names.outer
        return {f"{prefix}.{expert}.{part}.weight": one for expert, one in enumerate(value.unbind())}
    parts: dict[str, Tensor] = {}
    for expert, one in enumerate(value.unbind()):
        parts[f"{prefix}.{expert}.{names.inner}.bias"] = one[0, :hidden]
        parts[f"{prefix}.{expert}.{names.outer}.bias"] = one[0, hidden:]
    return parts


def _fed(convention: Convention) -> str:
    if convention.prediction == "ddpm_noise":
        return "DDPM steps"
    return f"{convention.time_scale:g} t + {convention.time_shift:g}"


def _fed_by(config: ModelConfig) -> str:
    return _fed(Convention(config.time_scale, config.time_shift, 1, config.prediction))


class Sizes(NamedTuple):
    """Fields of an architecture as a checkpoint tells them."""

    read: dict[str, Any]  # from the tensors
    assumed: dict[str, Any]  # what tensors cannot tell: the published value for this width or family


def read_sizes(state: Mapping[str, Tensor], router: str) -> Sizes:
    """Read width, depth, experts and the rest off a published state dict. CheckpointError where a key is missing."""
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
        read["unconditional_label"] = 1000  # their code compares with 1000, however long the label table is
    assumed: dict[str, Any] = {}
    if "pos_embed" in ours:
        read |= {"positions": "sincos", "latent_size": round(ours["pos_embed"].shape[1] ** 0.5) * patch}
    else:
        assumed |= {"positions": "rope_2d", "latent_size": 32}
    if "blocks.0.attn.q_norm.weight" in ours:
        read |= {"qk_norm": True, "num_heads": width // ours["blocks.0.attn.q_norm.weight"].shape[0]}
        read["qk_norm_eps"] = 1e-6 if "blocks.0.attn.Wqkv.weight" in state else 1e-5
    elif width in NUM_HEADS:
        assumed["num_heads"] = NUM_HEADS[width]
    if router == "dsmoe" and read.get("num_experts") == 48:  # the published runs with 48 experts
        assumed |= {"top_k": 5, "routed_scale": 2.5}
    return Sizes(read, assumed)


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
        f"MoE layers stand in blocks {', '.join(map(str, layers))}: not a pattern of a published family"
    )


def candidates(state: Mapping[str, Tensor]) -> list[tuple[Family, str]]:
    """Families and routers whose key names a state dict has; more than one, because the names coincide."""
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
