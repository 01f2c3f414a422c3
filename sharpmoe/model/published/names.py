"""Key names and time conventions of published checkpoints, and the conversion to and from ours. Defined only here.

The key names of the families coincide while their conventions differ, so the caller must name the family; nothing here
guesses it. Names follow the public code of ProMoE, DiffMoE (Kwai), DSMoE, DiT-MoE (feizc), SiT and DiT.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError

CheckpointFamily = Literal["promoe", "kwai", "dsmoe", "dit_moe", "sit", "dit", "nucleus"]
CHECKPOINT_FAMILIES: tuple[str, ...] = get_args(CheckpointFamily)


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


class PublishedDefaults(NamedTuple):
    """What a family says of models whose files do not determine it."""

    positions: Literal["sincos", "rope_2d"]  # without a table (pos_embed): a fixed table may be left out, RoPE has none
    latent_size: int = 32  # without a table: that of 256 x 256 pixels
    num_classes: int = 1000  # tells whether the last row of a label table stands for "no class"
    class_dropout: bool = True  # such a row is there, for a table of another length: all train with dropped labels


DEFAULTS: dict[str, PublishedDefaults] = {
    "promoe": PublishedDefaults("sincos"),
    "kwai": PublishedDefaults("sincos"),
    "dsmoe": PublishedDefaults("rope_2d"),
    "dit_moe": PublishedDefaults("sincos"),
    "sit": PublishedDefaults("sincos"),
    "dit": PublishedDefaults("sincos"),
}
ROUTERS: dict[str, tuple[str, ...]] = {
    "promoe": ("dense", "tc", "ec", "diffmoe", "promoe_tc", "promoe_ec"),
    "kwai": ("dense", "tc", "ec", "diffmoe"),
    "dsmoe": ("dense", "tc", "ec", "diffmoe", "dsmoe"),
    "dit_moe": ("dit_moe",),
    "sit": ("dense",),
    "dit": ("dense", "dit_moe"),  # DiT-MoE S and B were trained as DDPMs, XL and G by rectified flow
    "nucleus": ("nucleus",),  # a folder with a configuration: `published.folder`
}
SPELLINGS = {  # published names of fields that have another name here
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


class _LayerNames(NamedTuple):
    """How one router family spells the parts of an MoE layer."""

    gate: str
    layer: str = "mlp"
    experts: str = "experts"
    shared: str = "shared_experts"
    inner: str = "fc1"  # of a gelu expert
    outer: str = "fc2"


_PROMOE = _LayerNames("cluster_centers", shared="shared_expert", inner="up_proj", outer="down_proj")
NAMES: dict[str, _LayerNames] = {
    "dense": _LayerNames("gate.weight"),
    "tc": _LayerNames("gate.weight"),
    "ec": _LayerNames("gate_weight"),
    "diffmoe": _LayerNames("gate_weight"),
    "race": _LayerNames("gate_weight"),
    "promoe_tc": _PROMOE,
    "promoe_ec": _PROMOE,
    "dsmoe": _LayerNames("gate.weight", experts="experts.blocks"),
    "dit_moe": _LayerNames("gate.weight", layer="moe"),
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
    """Convert a published state dict to our keys and our sign of the velocity.

    Under a convention that predicts data - noise the final layer is negated; the convention of time is a matter of the
    architecture (`ModelConfig.time_scale`). Constants of training (`is_constant`) are dropped.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, value in state.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None or match[2].startswith(_DENSE_PARTS):
            converted[_plain_key(key)] = value.flatten(1) if key == "x_embedder.proj.weight" else value
        elif expert := _EXPERT_KEY.fullmatch(match[2]):
            experts.setdefault(match[1], {})[int(expert[1]), expert[2]] = value
        elif not is_constant(key):
            converted[f"{match[1]}.moe.{_layer_key(match[2], state, match[0])}"] = value
    for block, parts in experts.items():
        converted.update(_stack_experts(f"{block}.moe.experts", parts))
    if convention.sign < 0:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if name in converted:
                converted[name] = -converted[name]
    return converted


def is_constant(key: str) -> bool:
    """Whether a published key is a constant of training that no model needs: the decay of DiffMoE's thresholds."""
    return key.endswith(".ema_decay")


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
                f"{prefix}: expert {missing[0]} of {count} has no {name}; the checkpoint is incomplete"
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


def to_published(state: Mapping[str, Tensor], config: ModelConfig, family: CheckpointFamily) -> dict[str, Tensor]:
    """Invert `convert_published`: return our state dict (or gradients under our keys) with a family's key names.

    Raises CheckpointError where the model's time convention differs from the family's: the weights would compute
    another function there.
    """
    convention = CONVENTIONS[family]
    if (config.time_scale, config.time_shift, config.prediction) != (*convention[:2], convention.prediction):
        raise CheckpointError(
            f"family {family} feeds its time embedder {_time_input(convention)}, this model {_time_input_of(config)}: "
            "its weights would compute another function there; name a family with the convention of this model"
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


def _time_input(convention: Convention) -> str:
    if convention.prediction == "ddpm_noise":
        return "DDPM steps"
    return f"{convention.time_scale:g} t + {convention.time_shift:g}"


def _time_input_of(config: ModelConfig) -> str:
    return _time_input(Convention(config.time_scale, config.time_shift, 1, config.prediction))


# DiTTransformer2DModel of diffusers -> DiT. Every block has a copy of the embedders of time and class.
DIFFUSERS_KEY = "transformer_blocks.0.attn1.to_q.weight"  # a key that every such checkpoint has
_DIFFUSERS = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "y_embedder.embedding_table."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)
_DIFFUSERS_QUERY = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(weight|bias)")
_DIFFUSERS_LEFT = re.compile(r"transformer_blocks\.\d+\.(attn1\.to_[kv]\.|norm1\.emb\.)")


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of diffusers' DiT under the key names of DiT; keys without a counterpart stay as they are.

    Raises CheckpointError where the blocks' copies of an embedder differ: such a model was trained on in diffusers.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if query := _DIFFUSERS_QUERY.fullmatch(key):
            parts = [state[key.replace("to_q", f"to_{part}")] for part in "qkv"]
            renamed[f"blocks.{query[1]}.attn.qkv.{query[2]}"] = torch.cat(parts)
            continue
        ours = next((re.sub(f"^{old}", new, key) for old, new in _DIFFUSERS if re.match(old, key)), key)
        if ours != key:
            renamed[ours] = value
        elif not _DIFFUSERS_LEFT.match(key):
            renamed[key] = value
        elif ".norm1.emb." in key and not torch.equal(value, state[re.sub(r"blocks\.\d+", "blocks.0", key)]):
            raise CheckpointError(
                f"key {key} differs from that of the first block: DiT has one embedder for all blocks, so that these "
                "weights are another model; use weights that were converted from DiT"
            )
    return renamed
