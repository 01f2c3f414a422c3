"""Nucleus-Image in the layout of diffusers: config.json, key names, orders and signs, to and from ours. Pure.

Ours and theirs hold the same numbers. Theirs join the two factors of a gated MLP in one tensor, store experts as
(in, out), order the features of the output by channel, and predict data - noise.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.invocation import spell_command

TRANSFORMER_CLASS = "NucleusMoEImageTransformer2DModel"
_STRATEGIES = {  # of diffusers: leading and last blocks that are dense
    "leave_first_three_and_last_block_dense": (3, 1),
    "leave_first_three_blocks_dense": (3, 0),
    "leave_first_block_dense": (1, 0),
    "all_moe": (0, 0),
}
_ALL_DENSE = "all_dense"
_DEFAULTS: dict[str, Any] = {  # of diffusers, for keys that config.json leaves out
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 24,
    "attention_head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
    "mlp_ratio": 4.0,
    "moe_enabled": True,
    "dense_moe_strategy": "leave_first_three_and_last_block_dense",
    "num_experts": 128,
    "moe_intermediate_dim": 1344,
    "capacity_factors": 8.0,
    "use_sigmoid": False,
    "route_scale": 2.5,
    "use_grouped_mm": False,  # a kernel, not a function
}


def read_config(content: Mapping[str, Any], where: str, **changes: Any) -> ModelConfig:
    """Return the architecture of a transformer's config.json. changes: fields of `ModelConfig` that differ.

    Raises CheckpointError, naming `where`, for keys or values that have no counterpart.
    """
    unknown = [key for key in content if not key.startswith("_") and key not in _DEFAULTS]
    if unknown:
        raise CheckpointError(
            f"{where}: key {unknown[0]} is unknown: another architecture; known: {', '.join(_DEFAULTS)}"
        )
    found = {**_DEFAULTS, **content}
    strategy, depth = found["dense_moe_strategy"], found["num_layers"]
    if strategy not in (*_STRATEGIES, _ALL_DENSE):
        known = ", ".join((*_STRATEGIES, _ALL_DENSE))
        raise CheckpointError(f"{where}: dense_moe_strategy is {strategy!r}, expected one of {known}")
    is_dense = strategy == _ALL_DENSE or not found["moe_enabled"]
    dense_first, dense_last = (depth, 0) if is_dense else _STRATEGIES[strategy]
    channels, rest = divmod(found["in_channels"], found["patch_size"] ** 2)
    out_channels = found["in_channels"] if found["out_channels"] is None else found["out_channels"]
    if rest or out_channels != channels:
        raise CheckpointError(
            f"{where}: in_channels {found['in_channels']} and out_channels {out_channels}: expected in_channels = "
            f"out_channels * patch_size ** 2, as of a network that maps a latent to one of its shape"
        )
    width, factors = found["num_attention_heads"] * found["attention_head_dim"], found["capacity_factors"]
    capacity = {"capacities": tuple(factors)} if isinstance(factors, list | tuple) else {"capacity": factors}
    fields = {
        "router": "nucleus",
        "width": width,
        "depth": depth,
        "num_heads": found["num_attention_heads"],
        "num_kv_heads": found["num_key_value_heads"],
        "patch_size": found["patch_size"],
        "latent_channels": channels,
        "text_width": found["joint_attention_dim"],
        "rope_axes": tuple(found["axes_dims_rope"]),
        "mlp_ratio": found["mlp_ratio"],
        "mlp_hidden": int(width * found["mlp_ratio"] * 2 / 3) // 128 * 128,
        "dense_first": dense_first,
        "dense_last": dense_last,
        "num_experts": found["num_experts"],
        "expert_hidden": found["moe_intermediate_dim"],
        "score": "sigmoid" if found["use_sigmoid"] else "softmax",
        "routed_scale": found["route_scale"],
        "saliency_router": False,
        **capacity,
    }
    try:
        return ModelConfig(**{**fields, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, first['loc'])) or 'sizes'}: {first['msg']}") from error


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json for an architecture, without saliency routers.

    Raises CheckpointError where diffusers' class cannot compute it.
    """
    places = (config.dense_first, config.dense_last)
    strategy = next((name for name, known in _STRATEGIES.items() if known == places), None)
    content = {
        "_class_name": TRANSFORMER_CLASS,
        "patch_size": config.patch_size,
        "in_channels": config.latent_channels * config.patch_size**2,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.num_heads,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "joint_attention_dim": config.text_width,
        "axes_dims_rope": list(config.head_axes),
        "mlp_ratio": config.mlp_ratio,
        "moe_enabled": config.num_moe_layers > 0,
        "dense_moe_strategy": strategy if config.num_moe_layers else _ALL_DENSE,
        "num_experts": config.num_experts,
        "moe_intermediate_dim": config.expert_width,
        "capacity_factors": config.capacity if config.capacities is None else list(config.capacities),
        "use_sigmoid": config.score == "sigmoid",
        "route_scale": config.routed_scale,
    }
    again = read_config(content, "export")
    for field in ModelConfig.model_fields:
        resolved = {"mlp_hidden": "mlp_width", "num_kv_heads": "kv_heads", "rope_axes": "head_axes"}.get(field, field)
        resolved = {"expert_hidden": "expert_width", "shared_hidden": "shared_width"}.get(field, resolved)
        have, can = getattr(config, resolved), getattr(again, resolved)
        is_free = field in ("preset", "saliency_router", "capacity_selection", *config.architecture.ignores)
        is_free = is_free or (not config.num_moe_layers and field in ("dense_first", "dense_last"))
        is_free = is_free or (field == "capacity" and config.capacities is not None)  # each block has its own
        if not is_free and have != can:
            raise CheckpointError(
                f"export: {TRANSFORMER_CLASS} of diffusers cannot compute model.{field} {have!r}, only {can!r}; write "
                f"a folder with a pipeline of its own (`{spell_command('export')} RUN OUT/ --to pipeline`), or a "
                "weights file (no --to)"
            )
    return content


class Slices(Protocol):
    """A tensor, or a tensor in a file of which only what is asked for is read."""

    def __getitem__(self, place: Any, /) -> Tensor: ...


class PublishedPlace(NamedTuple):
    """Where a tensor of ours is in a published checkpoint, and in which form."""

    key: str
    form: str = "same"  # of _FORMS
    half: int = 0  # of the joined factors of a gated MLP: the first or the second


_KEYS = (
    (r"x_embedder\.proj\.(.+)", r"img_in.\1"),
    (r"t_embedder\.mlp\.0\.(.+)", r"time_text_embed.timestep_embedder.linear_1.\1"),
    (r"t_embedder\.mlp\.2\.(.+)", r"time_text_embed.timestep_embedder.linear_2.\1"),
    (r"t_embedder\.norm\.weight", r"time_text_embed.norm.weight"),
    (r"text_norm\.weight", r"txt_norm.weight"),
    (r"blocks\.(\d+)\.modulation\.(.+)", r"transformer_blocks.\1.img_mod.1.\2"),
    (r"blocks\.(\d+)\.text_proj\.(.+)", r"transformer_blocks.\1.encoder_proj.\2"),
    (r"blocks\.(\d+)\.attn\.([qkv])\.weight", r"transformer_blocks.\1.attn.to_\2.weight"),
    (r"blocks\.(\d+)\.attn\.text_([kv])\.weight", r"transformer_blocks.\1.attn.add_\2_proj.weight"),
    (r"blocks\.(\d+)\.attn\.([qk])_norm\.weight", r"transformer_blocks.\1.attn.norm_\2.weight"),
    (r"blocks\.(\d+)\.attn\.text_k_norm\.weight", r"transformer_blocks.\1.attn.norm_added_k.weight"),
    (r"blocks\.(\d+)\.attn\.unused_query_norm", r"transformer_blocks.\1.attn.norm_added_q.weight"),
    (r"blocks\.(\d+)\.attn\.proj\.weight", r"transformer_blocks.\1.attn.to_out.0.weight"),
    (r"blocks\.(\d+)\.moe\.gate\.weight", r"transformer_blocks.\1.img_mlp.gate.weight"),
    (r"blocks\.(\d+)\.moe\.shared\.down_proj\.weight", r"transformer_blocks.\1.img_mlp.shared_expert.net.2.weight"),
    (r"blocks\.(\d+)\.mlp\.down_proj\.weight", r"transformer_blocks.\1.img_mlp.net.2.weight"),
    (r"final_layer\.modulation\.(.+)", r"norm_out.linear.\1"),
)
_FORMED = (  # pattern, key, form, half
    (r"blocks\.(\d+)\.moe\.experts\.w1", r"transformer_blocks.\1.img_mlp.experts.gate_up_proj", "experts_half", 0),
    (r"blocks\.(\d+)\.moe\.experts\.w3", r"transformer_blocks.\1.img_mlp.experts.gate_up_proj", "experts_half", 1),
    (r"blocks\.(\d+)\.moe\.experts\.w2", r"transformer_blocks.\1.img_mlp.experts.down_proj", "experts", 0),
    (
        r"blocks\.(\d+)\.moe\.shared\.up_proj\.weight",
        r"transformer_blocks.\1.img_mlp.shared_expert.net.0.proj.weight",
        "half",
        0,
    ),
    (
        r"blocks\.(\d+)\.moe\.shared\.gate_proj\.weight",
        r"transformer_blocks.\1.img_mlp.shared_expert.net.0.proj.weight",
        "half",
        1,
    ),
    (r"blocks\.(\d+)\.mlp\.up_proj\.weight", r"transformer_blocks.\1.img_mlp.net.0.proj.weight", "half", 0),
    (r"blocks\.(\d+)\.mlp\.gate_proj\.weight", r"transformer_blocks.\1.img_mlp.net.0.proj.weight", "half", 1),
    (r"final_layer\.linear\.weight", "proj_out.weight", "output", 0),
)


def place_of(name: str) -> PublishedPlace | None:
    """Return where a parameter or buffer of ours is; None for saliency routers, which no published checkpoint has."""
    for pattern, key in _KEYS:
        if found := re.fullmatch(pattern, name):
            return PublishedPlace(found.expand(key))
    for pattern, key, form, half in _FORMED:
        if found := re.fullmatch(pattern, name):
            return PublishedPlace(found.expand(key), form, half)
    return None


def read_published(place: PublishedPlace, source: Slices, config: ModelConfig, experts: range | None = None) -> Tensor:
    """Return our tensor from the published one that holds it; of stacked experts only those in `experts`."""
    hidden = config.expert_width
    rows = slice(None) if experts is None else slice(experts.start, experts.stop)
    if place.form == "same":
        return source[:]
    if place.form == "experts":
        return source[rows].transpose(1, 2)
    if place.form == "experts_half":
        return source[rows, :, place.half * hidden : (place.half + 1) * hidden].transpose(1, 2)
    if place.form == "half":
        hidden = config.mlp_width if ".shared_expert." not in place.key else config.shared_width
        return source[place.half * hidden : (place.half + 1) * hidden]
    assert place.form == "output"
    patches = source[:].unflatten(0, (config.latent_channels, config.patch_size, config.patch_size))
    return -patches.permute(1, 2, 0, 3).flatten(0, 2)


def published_parts(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the published keys of our tensors `names`, in their order, each with the tensors of ours that it holds."""
    parts: dict[str, dict[int, str]] = {}
    for name in names:
        place = place_of(name)
        if place is not None:
            parts.setdefault(place.key, {})[place.half] = name
    return {key: tuple(held[half] for half in sorted(held)) for key, held in parts.items()}


def join_parts(parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """Return the published tensor that holds our tensors `parts`, given in the order of `published_parts`.

    Works on gradients too. Shares memory with a single part.
    """
    (name, first), *others = parts.items()
    place = place_of(name)
    assert place is not None
    if place.form == "experts":
        return first.transpose(1, 2)
    if place.form == "experts_half":
        return torch.cat([first, *(value for _, value in others)], dim=1).transpose(1, 2)
    if place.form == "half":
        return torch.cat([first, *(value for _, value in others)])
    if place.form == "output":
        patches = first.unflatten(0, (config.patch_size, config.patch_size, config.latent_channels))
        return -patches.permute(2, 0, 1, 3).flatten(0, 2)
    return first
