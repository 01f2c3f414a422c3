"""The diffusion transformer (DiT, arXiv 2212.09748) with adaLN-Zero blocks, as a backbone.

An MoE layer replaces the MLP of every second block (odd indices); router family, norms, positions and conditioning are
fields of the configuration.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.config import ModelConfig
from sharpmoe.flow import ddpm_input, ddpm_velocity
from sharpmoe.latent_patches import Grid, unpatchify
from sharpmoe.model.adaln import add_gated, modulate
from sharpmoe.model.backbone import (
    Backbone,
    ClassCondition,
    Condition,
    ModelOutput,
    Prepared,
    TextCondition,
    recomputed,
)
from sharpmoe.model.embed import (
    CrossAttention,
    LabelEmbed,
    PatchEmbed,
    TextEmbed,
    TimeEmbed,
    add_frame_positions,
    attention_bias,
    rotary_positions,
    rotate,
    sincos_positions,
)
from sharpmoe.model.initial import InitialRules, fill_parameters
from sharpmoe.moe.experts import feed_forward
from sharpmoe.moe.layer import BlockState, MoELayer
from sharpmoe.moe.router import at_least_float32
from sharpmoe.moe.routing import CallMode, Routing


class Context(NamedTuple):
    """What every block reads besides its tokens."""

    c: Tensor  # (B, D) time and condition, after SiLU
    text: "_Text | None" = None
    rope: Tensor | None = None  # (2, N, D / heads) cosines and sines
    unconditional: Tensor | None = None  # (B,) bool, where the model has an unconditional expert
    time: Tensor | None = None  # (B, D) embedded time alone, where gates read it


def _square_positions(config: ModelConfig) -> Tensor:
    side = config.latent_size // config.patch_size
    return sincos_positions(config.width, (side, side), side)


class DiT(Backbone):
    """Diffusion transformer with mixture-of-experts layers and saliency routers."""

    pos_embed: Tensor | None
    initial = InitialRules(  # blocks start as the identity
        zero=("modulation.", "cross_attn.proj.", "final_layer.linear."),
        normal=("t_embedder.", "y_embedder."),
        buffers={"pos_embed": _square_positions},
    )

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch_size, config.width)
        self.t_embedder = TimeEmbed(config.width, config.time_scale, config.time_shift)
        is_text = config.conditioning == "text"
        self.text_embedder = TextEmbed(config.text_width, config.pooled_width, config.width) if is_text else None
        self.y_embedder = None if is_text else LabelEmbed(config.num_classes, config.width, config.class_dropout)
        self.register_buffer("pos_embed", _square_positions(config) if config.positions == "sincos" else None)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.depth)])
        out_channels = config.latent_channels * (2 if config.learn_sigma else 1)
        self.final_layer = _FinalLayer(config.width, config.patch_size**2 * out_channels)
        fill_parameters(self, config, self.initial)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Prepared | Tensor,
        x0_prev: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> ModelOutput:
        prepared = condition if isinstance(condition, _Prepared) else self._embed_condition(condition)
        if self.config.prediction == "ddpm_noise":
            scaled, step = ddpm_input(x_t, t)
            noise, records = self._network(scaled, step, prepared, x0_prev, mode)
            return ModelOutput(ddpm_velocity(scaled, noise, step), records)
        return ModelOutput(*self._network(x_t, t, prepared, x0_prev, mode))

    def prepare(self, condition: Condition) -> "_Prepared":
        """Embed a condition once for all steps; keeps depth * B * L * 2 D numbers of text."""
        prepared = self._embed_condition(condition)
        if prepared.text is None:
            return prepared
        attentions = [module for module in self.modules() if isinstance(module, CrossAttention)]  # in depth order
        keys_values = tuple(attention.keys_values(prepared.text.tokens) for attention in attentions)
        return prepared._replace(text=prepared.text._replace(keys_values=keys_values))

    def gathered_units(self) -> list[tuple[str, nn.Module]]:
        condition = [("text_embedder", self.text_embedder), ("y_embedder", self.y_embedder)]
        return [
            ("x_embedder", self.x_embedder),
            ("t_embedder", self.t_embedder),
            *((name, part) for name, part in condition if part is not None),
            *((f"blocks.{index}", block) for index, block in enumerate(self.blocks)),
            ("final_layer", self.final_layer),
        ]

    def count_parameters(self) -> tuple[int, int]:
        """Count positions too, as published figures do."""
        positions = 0 if self.pos_embed is None else self.pos_embed.numel()
        total, active = super().count_parameters()
        return total + positions, active + positions

    def _network(
        self, x_t: Tensor, t: Tensor, prepared: "_Prepared", x0_prev: Tensor | None, mode: CallMode
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """What the network itself predicts (B, C, [T,] H, W) float32 or better, and the routing records."""
        grid = self._grid(x_t)
        positions = self._positions(grid)
        tokens = self._embed(x_t, positions)
        x0_prev_tokens = None if x0_prev is None else self._embed(x0_prev.detach(), positions)
        time = self.t_embedder(t)
        c = functional.silu(time + prepared.c)
        read_time = time if self.config.gate_input == "time_and_state" else None
        context = Context(c, prepared.text, self._rotary(t.device, grid), prepared.unconditional, read_time)
        records: list[Routing] = []
        for index, block in enumerate(self.blocks):
            own_mode = mode.for_layer(len(records)) if block.moe is not None else mode._replace(routing_maps=None)
            inputs = (tokens, _of_block(context, index), x0_prev_tokens, own_mode)
            tokens, routing = recomputed(block, *inputs) if mode.recompute else block(*inputs)
            if routing is not None:
                records.append(routing)
        return self._latent(self.final_layer(tokens, c), grid), tuple(records)

    def _grid(self, latent: Tensor) -> Grid:
        """Tokens (h, w), or (T, h, w), of a latent."""
        patch, (channels, *frames, height, width) = self.config.patch_size, latent.shape[1:]
        fits = channels == self.config.latent_channels and len(frames) <= int(self.config.takes_frames)
        if not fits or height % patch or width % patch or 0 in latent.shape[1:]:
            axes = "(C, H, W) or (C, T, H, W)" if self.config.takes_frames else "(C, H, W)"
            raise ValueError(
                f"latent {tuple(latent.shape[1:])}: expected {self.config.latent_channels} channels and sides that are "
                f"multiples of the patch size {patch}, as {axes}"
            )
        return (*frames, height // patch, width // patch)

    def _positions(self, grid: Grid) -> Tensor | None:
        """Positions (1, N, D) that are added to tokens, where the family adds them."""
        if self.pos_embed is None:
            return None
        *frames, height, width = grid
        side, positions = self.config.latent_size // self.config.patch_size, self.pos_embed
        if (height, width) != (side, side):
            positions = sincos_positions(self.config.width, (height, width), side, positions.device)
        return add_frame_positions(positions, frames[0]) if frames else positions

    def _embed(self, latent: Tensor, positions: Tensor | None) -> Tensor:
        tokens: Tensor = self.x_embedder(latent.to(self.x_embedder.proj.weight.dtype))
        return tokens if positions is None else tokens + positions.to(tokens.dtype)

    def _embed_condition(self, condition: Condition | Prepared | Tensor) -> "_Prepared":
        condition = ClassCondition(condition) if isinstance(condition, Tensor) else condition
        if self.text_embedder is not None:
            if not isinstance(condition, TextCondition):
                raise TypeError(f"a text-conditional model takes a TextCondition, got {type(condition).__name__}")
            tokens, pooled = self.text_embedder(condition)
            return _Prepared(pooled, _Text(tokens, attention_bias(condition.mask, tokens.dtype)), None)
        assert self.y_embedder is not None
        if not isinstance(condition, ClassCondition):
            raise TypeError(f"a class-conditional model takes a ClassCondition, got {type(condition).__name__}")
        unconditional = None
        if self.config.unconditional_expert:
            label = self.config.unconditional_label
            unconditional = condition.labels == (self.config.num_classes if label is None else label)
        return _Prepared(self.y_embedder(condition.labels), None, unconditional)

    def _rotary(self, device: torch.device, grid: Grid) -> Tensor | None:
        """Rotary positions where the family has them; computed at each call, because a buffer would be saved."""
        config = self.config
        if config.positions == "sincos":
            return None
        height, width = grid
        return rotary_positions(config.width // config.num_heads, (height, width), config.positions, device)

    def _latent(self, tokens: Tensor, grid: Grid) -> Tensor:
        out_channels = tokens.shape[-1] // self.config.patch_size**2
        raw = unpatchify(tokens, self.config.patch_size, out_channels, grid)
        return at_least_float32(raw[:, : self.config.latent_channels])  # learn_sigma: the rest is not used


class Block(nn.Module):
    """adaLN-Zero block: self-attention, cross-attention to text where there is text, then MLP or MoE."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        is_rms = config.norm == "rmsnorm"
        self.norm1 = _RmsNorm(config.width) if is_rms else None
        self.norm2 = _RmsNorm(config.width) if is_rms else None
        self.attn = _Attention(config)
        self.cross_attn = CrossAttention(config.width, config.num_heads) if config.conditioning == "text" else None
        is_moe = config.is_moe(index)
        self.moe = MoELayer(config.of_block(index)) if is_moe else None
        self.mlp = None if is_moe else feed_forward(config.mlp, config.width, config.mlp_width)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(
        self, x: Tensor, context: Context, x0_prev_tokens: Tensor | None = None, mode: CallMode = CallMode()
    ) -> tuple[Tensor, Routing | None]:
        """Map tokens x (B, N, D) to (B, N, D); also returns the routing record of an MoE block."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(context.c).chunk(6, dim=-1)
        h = modulate(_normalise(x, self.norm1), shift_a, scale_a)
        x = add_gated(x, gate_a, self.attn(h, context.rope))
        if self.cross_attn is not None and context.text is not None:
            tokens, bias, keys_values = context.text
            x = x + self.cross_attn(_layer_norm(x), tokens, bias, keys_values[0] if keys_values else None)
        normed = _normalise(x, self.norm2)
        state = None if context.time is None else BlockState(context.time, normed)
        h = modulate(normed, shift_m, scale_m)
        y, routing = self._feed_forward(h, context, x0_prev_tokens, mode, state)
        return add_gated(x, gate_m, y), routing

    def _feed_forward(
        self,
        h: Tensor,
        context: Context,
        x0_prev_tokens: Tensor | None,
        mode: CallMode,
        state: BlockState | None,
    ) -> tuple[Tensor, Routing | None]:
        if self.moe is not None:
            moe_output: tuple[Tensor, Routing] = self.moe(h, x0_prev_tokens, context.unconditional, mode, state)
            return moe_output
        assert self.mlp is not None
        return self.mlp(h), None


class _Attention(nn.Module):
    """Multi-head self-attention, with normalised queries and keys and rotary positions where the family has them."""

    matrices: ClassVar = {"qkv.weight": 3, "proj.weight": 1}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_axes = 2 if config.positions == "rope_2d" else 1
        width, head = config.width, config.width // config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head, eps=config.qk_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head, eps=config.qk_norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Map x (B, N, D) to (B, N, D); rope (2, N, D / heads) cosines and sines of `rotary_positions`."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope, self.rope_axes), rotate(k, rope, self.rope_axes)
        out = functional.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(b, n, d))
        return mixed


class _FinalLayer(nn.Module):
    """adaLN and the linear map to patches; starts at zero."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x (B, N, D), with c (B, D) after SiLU, to patches (B, N, p p C)."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(_layer_norm(x), shift, scale))
        return out


class _RmsNorm(nn.Module):
    """Root-mean-square norm with a weight, eps 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class _Text(NamedTuple):
    """Embedded caption tokens that every block attends to."""

    tokens: Tensor  # (B, L, D)
    bias: Tensor  # (B, 1, 1, L) `attention_bias` of its mask
    keys_values: tuple[Tensor, ...] = ()  # (B, L, 2 D) of every block, or of the one, where they were prepared


class _Prepared(NamedTuple):
    """What the network computes of a condition apart from time: the same at every step of a sampling run."""

    c: Tensor  # (B, D)
    text: _Text | None
    unconditional: Tensor | None  # (B,) bool, where the model has an unconditional expert


def _of_block(context: Context, index: int) -> Context:
    """The context of one block: of keys and values that were prepared it gets its own alone."""
    text = context.text
    if text is None or not text.keys_values:
        return context
    return context._replace(text=text._replace(keys_values=(text.keys_values[index],)))


def _normalise(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Apply the block's norm to x (B, N, D): the parameter-free one unless the family has its own."""
    return _layer_norm(x) if norm is None else norm(x)


def _layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, eps 1e-6."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)
