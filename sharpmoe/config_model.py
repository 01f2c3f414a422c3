"""The architecture of a model as a section of the run configuration, and what every section is based on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from sharpmoe.architectures import ARCHITECTURES, Architecture
from sharpmoe.families import FAMILIES, Family

# width, depth, num_heads of the published DiT sizes (arXiv 2212.09748) and of the shipped toy.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "depth": 6, "num_heads": 4},
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16},
}
_SIDE_SHARE = 7 / 16  # of a head, that turns with the row, and as much with the column (rope_3d)

_Capacity = Annotated[float, Field(ge=0)]
_WIDEST = 2**20  # of sizes of a model: beyond it, products of sizes leave 64 bits, and no device holds one layer


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text field whose value is a key of `table`, looked up when a value is validated."""

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __str__(self) -> str:
        return " | ".join(self.table)

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.table:
            raise PydanticCustomError("one_of", "Input should be one of {choices}", {"choices": str(self)})
        return value


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true where a number is expected: pydantic takes it for 1."""
        values = value if isinstance(value, list | tuple) else [value]
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, dict) and get_origin(kind) is dict:
            values = list(value.values())
        if any(isinstance(one, bool) for one in values) and kind is not bool:
            raise PydanticCustomError("not_bool", "Input should not be true or false")
        return value


class ModelConfig(Section):
    """The architecture. Everything needed to rebuild a model from a weights file."""

    backbone: Annotated[str, OneOf(ARCHITECTURES)] = "dit"  # the network, one of sharpmoe/architectures.py
    preset: Literal["tiny", "s", "b", "l", "xl"] | None = None  # fills width, depth, num_heads where they are not given
    width: int = Field(128, ge=8, le=_WIDEST)  # D, features of a token
    depth: int = Field(6, ge=1, le=10_000)  # blocks
    num_heads: int = Field(4, ge=1, le=_WIDEST)  # attention heads
    num_kv_heads: int | None = Field(None, ge=1, le=_WIDEST)  # heads of keys and values (nucleus); None: num_heads
    mlp_ratio: float = Field(4.0, gt=0, le=1024)  # hidden width of an MLP over width
    mlp_hidden: int | None = Field(None, ge=1, le=_WIDEST)  # hidden width of dense MLPs; None: width * mlp_ratio
    patch_size: int = Field(2, ge=1, le=_WIDEST)  # latent pixels of a token, each way
    latent_channels: int = Field(4, ge=1, le=_WIDEST)  # C
    latent_size: int = Field(32, ge=1, le=_WIDEST)  # side of the square latent; buckets may differ (docs/design/0011)
    # T, frames of a latent (C, T, H, W), as prepare.py --frames makes them; 1: still latents (C, H, W) (docs/video.md).
    latent_frames: int = Field(1, ge=1, le=2**16)
    learn_sigma: bool = False  # published checkpoints predict 2C channels, of which the first C are used
    router: Annotated[str, OneOf(FAMILIES)] = "diffmoe"  # a family of sharpmoe/families.py
    num_experts: int = Field(8, ge=1, le=_WIDEST)  # E, without the unconditional expert
    top_k: int = Field(1, ge=1, le=_WIDEST)  # experts per token (token choice: tc, promoe_tc, dsmoe, dit_moe)
    capacity: float = Field(1.0, gt=0)  # mean experts per token (ec, promoe_ec, diffmoe, race, nucleus)
    capacities: tuple[_Capacity, ...] | None = None  # capacity of every block, dense ones included; None: the same
    # Inference of diffmoe (moe/selection.py). With mask the capacity predictor alone chooses, which does not read
    # x0_prev: saliency routers then move gates, but no compute.
    capacity_selection: Literal["count", "mask"] = "count"
    gate: Literal["linear", "prototypes", "mlp"] = "linear"  # prototypes: cosine to a centre per expert (ProMoE)
    score: Literal["softmax", "sigmoid", "identity", "token_softmax"] = "softmax"  # logits to scores
    # What gate, capacity predictor and heads read: the tokens as the experts get them, or the time embedding beside the
    # normalised tokens before modulation.
    gate_input: Literal["modulated", "time_and_state"] = "modulated"
    renormalise: bool = False  # the gates of a token's experts sum to routed_scale; with token choice if top_k > 1
    routed_scale: float = Field(1.0, gt=0)  # multiplies the gates (dsmoe, nucleus)
    num_groups: int = Field(1, ge=1)  # dsmoe: experts are chosen inside the best top_groups of num_groups groups
    top_groups: int = Field(1, ge=1)  # see num_groups
    bias_balancing: bool = False  # token choice: a bias per expert, for the choice only, balances loads without a loss
    unconditional_expert: bool = False  # one more expert for all tokens of images without class, and only those
    unconditional_label: int | None = Field(None, ge=0)  # the label of such images; None: num_classes, "no class"
    expert: Literal["gelu", "swiglu"] = "gelu"  # kind of the routed experts
    expert_hidden: int | None = Field(None, ge=1, le=_WIDEST)  # None: width * mlp_ratio
    shared: Literal["none", "gelu", "swiglu", "identity"] = "none"  # added to the routed experts for every token
    shared_hidden: int | None = Field(None, ge=1, le=_WIDEST)  # None: as the routed experts
    layer_heads: bool = False  # race: each MoE layer predicts the target from its input, for its loss only
    mlp: Literal["gelu", "silu", "swiglu"] = "gelu"  # dense blocks
    moe_every: int = Field(2, ge=1)  # one MoE block in so many, the last of them: 2 is the odd indices, 1 is all
    dense_first: int = Field(0, ge=0)  # leading blocks that are dense in any case
    dense_last: int = Field(0, ge=0)  # last blocks that are dense in any case
    # sincos: added to tokens; rope: turns q and k, rope_3d by frame, row and column.
    positions: Literal["sincos", "rope_2d", "rope_1d", "rope_3d"] = "sincos"
    # Features of a head that turn with each axis of rope_3d; None: row and column 7/16 each, as published.
    rope_axes: tuple[int, int, int] | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # of the blocks
    qk_norm: bool = False  # LayerNorm of queries and keys per head
    qk_norm_eps: float = Field(1e-5, gt=0)  # epsilon of that norm
    saliency_router: bool = True  # a second router in every MoE layer, which reads x0_prev
    conditioning: Literal["class", "text"] = "text"  # class labels, or text states
    num_classes: int = Field(1000, ge=1, le=2**31)  # classes of the label table
    class_dropout: bool = True  # an extra row of the label table stands for "no class"
    text_width: int = Field(384, ge=1, le=_WIDEST)  # features of a token state of the text encoder
    pooled_width: int = Field(384, ge=1, le=_WIDEST)  # features of its pooled state
    time_scale: float = 1000.0  # the time embedder reads time_scale * t + time_shift
    time_shift: float = 0.0  # see time_scale
    prediction: Literal["velocity", "ddpm_noise"] = "velocity"  # ddpm_noise: noise, converted to a velocity

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("preset"), str):
            data = {**SIZES.get(data["preset"], {}), **data}
        router, width = (data.get(key, cls.model_fields[key].default) for key in ("router", "width"))
        family = FAMILIES.get(str(router))
        fields = family.model_fields(width) if family and isinstance(width, int) else {}
        backbone = {**fields, **data}.get("backbone", cls.model_fields["backbone"].default)
        architecture = ARCHITECTURES.get(str(backbone))
        return {**fields, **(architecture.fields if architecture else {}), **data}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide width ({self.width})")
        if self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of 4 for 2-D sin-cos positions")
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide latent_size ({self.latent_size})")
        if self.family.competition == "token" and self.top_k > self.num_experts:
            raise ValueError(f"top_k ({self.top_k}) must be at most num_experts ({self.num_experts})")
        self._check_architecture()
        if self.capacities is not None and len(self.capacities) != self.depth:
            raise ValueError(f"capacities has {len(self.capacities)} numbers, expected one per block ({self.depth})")
        for capacity in {layer.capacity for layer in self.moe_blocks} if self.family.varies_compute else ():
            if not 0 < capacity <= self.num_experts:
                key = "capacity" if self.capacities is None else "every capacity of an MoE block"
                raise ValueError(f"{key} ({capacity}) must be at most num_experts ({self.num_experts}), and above 0")
        if self.num_groups > 1 and (self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups):
            raise ValueError(
                f"num_groups ({self.num_groups}) must cut num_experts ({self.num_experts}) into groups of 2 or more"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups ({self.top_groups}) must be at most num_groups ({self.num_groups})")
        if self.layer_heads and self.gate != "mlp":
            raise ValueError("layer_heads needs gate: mlp")
        if self.unconditional_expert and self.conditioning != "class":
            raise ValueError("unconditional_expert needs conditioning: class")
        if self.unconditional_expert and self.family.pools_calls:
            raise ValueError(f"unconditional_expert does not go with router: {self.router} (tokens of a call compete)")
        if self.positions == "rope_2d" and (self.width // self.num_heads) % 4:
            raise ValueError(f"rope_2d needs a head width ({self.width // self.num_heads}) that is a multiple of 4")
        return self

    def _check_architecture(self) -> None:
        """Raise ValueError where a field has a value that the backbone does not take."""
        for key, values in self.architecture.takes.items():
            if getattr(self, key) not in values:
                allowed = " or ".join("null" if value is None else str(value) for value in values)
                raise ValueError(f"{key} is {getattr(self, key)}, backbone {self.backbone} takes {allowed}")
        if self.latent_frames > 1 and not self.takes_frames:
            remedy = " or ".join(f"positions: {name}" for name in self.architecture.frames_with) or "backbone: dit"
            raise ValueError(
                f"latent_frames is {self.latent_frames}, but backbone {self.backbone} with positions {self.positions} "
                f"takes still images alone (latent_frames 1); frames need {remedy}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        axes, head = self.head_axes, self.width // self.num_heads
        if self.positions == "rope_3d" and (sum(axes) != head or any(axis < 0 or axis % 2 for axis in axes)):
            raise ValueError(f"rope_axes {list(axes)} must be even numbers that sum to the head width ({head})")

    @property
    def title(self) -> str:
        """Router, backbone, width, depth and heads, for people."""
        return f"{self.router} {self.architecture.title} {self.width}/{self.depth}/{self.num_heads}"

    @property
    def architecture(self) -> Architecture:
        """The record of the backbone."""
        return ARCHITECTURES[self.backbone]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields: peft and other libraries ask the configuration of a model for them by this name."""
        return self.model_dump()

    @property
    def family(self) -> Family:
        """The record of the router family."""
        return FAMILIES[self.router]

    @property
    def router_loss(self) -> str | None:
        """Key in `losses.ROUTER_LOSSES` of the loss on the router, or None.

        A bias that balances the loads replaces the balance loss. The contrast is one between prototypes: a gate of
        prototypes is trained by it in place of balance, and a gate without them by balance.
        """
        loss = self.family.router_loss
        if loss == "balance" and self.bias_balancing:
            return None
        if loss in ("balance", "contrastive"):
            return "contrastive" if self.gate == "prototypes" else "balance"
        return loss

    @property
    def head_loss(self) -> str | None:
        """Key in `losses.HEAD_LOSSES` of the loss on heads beside the router, or None."""
        return self.family.head_loss or ("layers" if self.layer_heads else None)

    @property
    def counts_calls(self) -> bool:
        """Whether inference ranks the tokens of a call against each other: results then depend on how a batch is cut.

        That is DiffMoE's count. Its mask and Expert Race compare each token with a threshold, token choice a token's
        own scores, expert choice the tokens of an image.
        """
        if self.family.thresholds is None:
            return self.family.competition_in(training=False) in ("call", "all")
        return self.family.thresholds == "predicted" and self.capacity_selection == "count"

    @property
    def contrasts_calls(self) -> bool:
        """Whether the loss on the router compares the tokens of a whole call: the contrast with token choice."""
        return self.gate == "prototypes" and self.family.competition == "token"

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(block) for block in range(self.depth))

    @property
    def moe_blocks(self) -> tuple[ModelConfig, ...]:
        """The configuration of every MoE layer, in depth order: this one, with the layer's own capacity."""
        return tuple(self.of_block(block) for block in range(self.depth) if self.is_moe(block))

    @property
    def mean_capacity(self) -> float:
        """Mean experts per token over the MoE layers, where experts choose."""
        capacities = [block.capacity for block in self.moe_blocks]
        return sum(capacities) / len(capacities) if capacities and self.capacities else self.capacity

    @property
    def renormalises(self) -> bool:
        """Whether gates are divided by their sum over a token's experts; of a single expert that would be one."""
        return self.renormalise and (self.top_k > 1 or self.family.varies_compute)

    @property
    def gate_width(self) -> int:
        """Features that gate, capacity predictor and heads read."""
        return self.width * (2 if self.gate_input == "time_and_state" else 1)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_axes(self) -> tuple[int, int, int]:
        """Features of a head that turn with frame, row and column (rope_3d)."""
        head = self.width // self.num_heads
        side = int(head * _SIDE_SHARE) // 2 * 2
        return self.rope_axes or (head - 2 * side, side, side)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP of a dense block."""
        return self.mlp_hidden or int(self.width * self.mlp_ratio)

    @property
    def num_tokens(self) -> int:
        """Tokens of all frames of the square of `latent_size`; images of other sizes have others."""
        return self.latent_frames * (self.latent_size // self.patch_size) ** 2

    @property
    def takes_frames(self) -> bool:
        """Whether the network tells frames apart, so that latents may have a time axis."""
        return self.positions in self.architecture.frames_with

    def shape_of_latent(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return (C, H, W), or (C, T, H, W) where the model has frames; `size` (H, W): by default the square."""
        frames = (self.latent_frames,) if self.latent_frames > 1 else ()
        return (self.latent_channels, *frames, *(size or (self.latent_size, self.latent_size)))

    @property
    def total_experts(self) -> int:
        """Experts of an MoE layer with the unconditional one."""
        return self.num_experts + int(self.unconditional_expert)

    @property
    def expert_width(self) -> int:
        """Hidden width of a routed expert."""
        return self.expert_hidden or int(self.width * self.mlp_ratio)

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert."""
        return self.shared_hidden or self.expert_width

    def is_moe(self, block: int) -> bool:
        """Whether block `block` (0-based) holds an MoE layer."""
        in_turn = block % self.moe_every == self.moe_every - 1
        is_inside = self.dense_first <= block < self.depth - self.dense_last
        return self.family.has_experts and in_turn and is_inside

    def of_block(self, block: int) -> ModelConfig:
        """Return the configuration of the MoE layer of block `block` (0-based): this one, with its own capacity."""
        if self.capacities is None:
            return self
        return self.model_copy(update={"capacity": self.capacities[block]})
