"""The transformer of Nucleus-Image (arXiv 2604.12163) as a backbone.

Image tokens attend to themselves and to the text together; text never enters the trunk: every block makes its keys and
values of the text states. Time alone modulates, by scales and gates without shifts. Grouped-query attention and rotary
positions on three axes (frame, row, column); feed-forward networks are MoE layers or gated MLPs.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.config import ModelConfig
from sharpmoe.latent_patches import unpatchify
from sharpmoe.model.backbone import Backbone, Condition, ModelOutput, Prepared, TextCondition, recomputed
from sharpmoe.model.embed import PatchEmbed, attention_bias
from sharpmoe.model.initial import InitialRules, fill_parameters
from sharpmoe.moe.experts import feed_forward
from sharpmoe.moe.layer import BlockState, MoELayer
from sharpmoe.moe.router import at_least_float32
from sharpmoe.moe.routing import CallMode, Routing

_EPS = 1e-6  # of all norms
_LARGEST_GATE = 2.0  # gates of a block are clamped to it before tanh
_THETA = 10000.0  # longest period of time features and rotary positions, over 2 pi


class _Prepared(NamedTuple):
    """What the network computes of a condition: the same at every step and for every grid."""

    states: Tensor | None  # (B, L, D_text) normalised; None where keys and values were made of them
    mask: Tensor  # (B, L) bool
    keys_values: tuple[Tensor, ...] = ()  # (B, L, 2, heads, D / heads) of every block, keys without positions


class _Context(NamedTuple):
    """What every block reads besides its tokens."""

    c: Tensor  # (B, D) time, after SiLU
    time: Tensor  # (B, D) embedded time
    rope: Tensor  # (2, N + L, D / heads / 2) cosines and sines of image tokens, then text tokens
    bias: Tensor  # (B, 1, 1, N + L) `attention_bias` of what image tokens attend to
    states: Tensor | None  # (B, L, D_text)
    keys_values: Tensor | None  # of this block, where they were prepared


class Nucleus(Backbone):
    """Nucleus-Image's transformer, with saliency routers."""

    initial = InitialRules(zero=("modulation.", "final_layer.linear."), normal=("t_embedder.",))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch_size, config.width)
        self.t_embedder = _TimeEmbed(config.width, config.time_scale)
        self.text_norm = nn.RMSNorm(config.text_width, eps=_EPS)
        self.blocks = nn.ModuleList([_Block(config, index) for index in range(config.depth)])
        self.final_layer = _FinalLayer(config.width, config.patch_size**2 * config.latent_channels)
        fill_parameters(self, config, self.initial)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Prepared | Tensor,
        x0_prev: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> ModelOutput:
        prepared = condition if isinstance(condition, _Prepared) else self._normalise_text(condition)
        grid = self._grid(x_t)
        tokens = self._embed(x_t)
        x0_prev_tokens = None if x0_prev is None else self._embed(x0_prev.detach())
        time = self.t_embedder(t)
        bias = attention_bias(functional.pad(prepared.mask, (grid[0] * grid[1], 0), value=True), tokens.dtype)
        rope = _rotary(self.config.head_axes, grid, prepared.mask.shape[1], t.device)
        context = _Context(
            c=functional.silu(time), time=time, rope=rope, bias=bias, states=prepared.states, keys_values=None
        )
        records: list[Routing] = []
        for index, block in enumerate(self.blocks):
            own = context._replace(keys_values=prepared.keys_values[index]) if prepared.keys_values else context
            own_mode = mode.for_layer(len(records)) if block.moe is not None else mode._replace(routing_maps=None)
            inputs = (tokens, own, x0_prev_tokens, own_mode)
            tokens, routing = recomputed(block, *inputs) if mode.recompute else block(*inputs)
            if routing is not None:
                records.append(routing)
        patches = self.final_layer(tokens, context.c)
        latent = unpatchify(patches, self.config.patch_size, self.config.latent_channels, grid)
        return ModelOutput(at_least_float32(latent), tuple(records))

    def prepare(self, condition: Condition) -> _Prepared:
        """Make the keys and values of a text once for all steps; keeps depth * B * L * 2 D kv_heads / heads numbers."""
        states, mask, _ = self._normalise_text(condition)
        blocks = [block for block in self.blocks if isinstance(block, _Block)]
        return _Prepared(None, mask, tuple(block.keys_values(states) for block in blocks))

    def gathered_units(self) -> list[tuple[str, nn.Module]]:
        return [
            ("x_embedder", self.x_embedder),
            ("text_norm", self.text_norm),
            ("t_embedder", self.t_embedder),
            *((f"blocks.{index}", block) for index, block in enumerate(self.blocks)),
            ("final_layer", self.final_layer),
        ]

    def _grid(self, latent: Tensor) -> tuple[int, int]:
        """Tokens (h, w) of a latent."""
        patch, (channels, *frames, height, width) = self.config.patch_size, latent.shape[1:]
        if frames or channels != self.config.latent_channels or height % patch or width % patch or not height * width:
            raise ValueError(
                f"latent {tuple(latent.shape[1:])}: expected {self.config.latent_channels} channels and sides that are "
                f"multiples of the patch size {patch}, as (C, H, W)"
            )
        return height // patch, width // patch

    def _embed(self, latent: Tensor) -> Tensor:
        tokens: Tensor = self.x_embedder(latent.to(self.x_embedder.proj.weight.dtype))
        return tokens

    def _normalise_text(self, condition: Condition | Prepared | Tensor) -> _Prepared:
        if not isinstance(condition, TextCondition):
            raise TypeError(f"a text-conditional model takes a TextCondition, got {type(condition).__name__}")
        return _Prepared(self.text_norm(condition.tokens.to(self.text_norm.weight.dtype)), condition.mask)


class _Block(nn.Module):
    """Attention to image and text, then MLP or MoE, each scaled before and gated after by time."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(config.text_width, config.width)
        self.attn = _JointAttention(config)
        is_moe = config.is_moe(index)
        self.moe = MoELayer(config.of_block(index)) if is_moe else None
        self.mlp = None if is_moe else feed_forward(config.mlp, config.width, config.mlp_width)
        self.modulation = nn.Linear(config.width, 4 * config.width)

    def forward(
        self, x: Tensor, context: _Context, x0_prev_tokens: Tensor | None = None, mode: CallMode = CallMode()
    ) -> tuple[Tensor, Routing | None]:
        """Map tokens x (B, N, D) to (B, N, D); also returns the routing record of an MoE block."""
        scale_a, gate_a, scale_m, gate_m = self.modulation(context.c).unsqueeze(1).chunk(4, dim=-1)
        keys_values = self.keys_values(context.states) if context.keys_values is None else context.keys_values
        h = _layer_norm(x) * (1 + scale_a)
        x = x + _squash(gate_a) * self.attn(h, keys_values, context.rope, context.bias)
        normed = _layer_norm(x)
        h = normed * (1 + scale_m)
        if self.moe is None:
            assert self.mlp is not None
            return x + _squash(gate_m) * self.mlp(h), None
        y, routing = self.moe(h, x0_prev_tokens, None, mode, BlockState(context.time, normed))
        return x + _squash(gate_m) * y, routing

    def keys_values(self, states: Tensor | None) -> Tensor:
        """Make this block's keys and values of normalised text states (B, L, D_text)."""
        assert states is not None
        made: Tensor = self.attn.keys_values(self.text_proj(states))
        return made


class _JointAttention(nn.Module):
    """Attention of image tokens to image and text tokens; several query heads share a head of keys and values."""

    matrices: ClassVar = {f"{name}.weight": 1 for name in ("q", "k", "v", "text_k", "text_v", "proj")}
    unused_query_norm: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        width, head = config.width, config.width // config.num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, head * self.kv_heads, bias=False)
        self.v = nn.Linear(width, head * self.kv_heads, bias=False)
        self.text_k = nn.Linear(width, head * self.kv_heads, bias=False)
        self.text_v = nn.Linear(width, head * self.kv_heads, bias=False)
        self.q_norm = nn.RMSNorm(head, eps=_EPS)
        self.k_norm = nn.RMSNorm(head, eps=_EPS)
        self.text_k_norm = nn.RMSNorm(head, eps=_EPS)
        self.proj = nn.Linear(width, width, bias=False)
        # Published files hold the norm of text queries, which no layer makes; kept, so that they are written back.
        self.register_buffer("unused_query_norm", torch.ones(head))

    def keys_values(self, text: Tensor) -> Tensor:
        """Make normalised keys and values (B, L, 2, heads, D / heads) of text (B, L, D); keys without positions.

        They depend on the text only: positions follow from the grid of the image.
        """
        k, v = (layer(text).unflatten(-1, (self.kv_heads, -1)) for layer in (self.text_k, self.text_v))
        return torch.stack([self.text_k_norm(k), v], dim=2)

    def forward(self, x: Tensor, text: Tensor, rope: Tensor, bias: Tensor) -> Tensor:
        """Map x (B, N, D) to (B, N, D), with `keys_values` of the text, positions (2, N + L, ...) and the bias."""
        tokens = x.shape[1]
        q = self.q_norm(self.q(x).unflatten(-1, (self.num_heads, -1)))
        k = self.k_norm(self.k(x).unflatten(-1, (self.kv_heads, -1)))
        v = self.v(x).unflatten(-1, (self.kv_heads, -1))
        q = _rotate(q, rope[:, :tokens])
        k = _rotate(torch.cat([k, text[:, :, 0]], dim=1), rope)
        v = torch.cat([v, text[:, :, 1]], dim=1)
        shared = self.num_heads // self.kv_heads
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


class _TimeEmbed(nn.Module):
    """Sinusoidal features of scale * t as wide as the model, a two-layer SiLU MLP, a norm."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale, self.width = scale, width
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.norm = nn.RMSNorm(width, eps=_EPS)

    def forward(self, t: Tensor) -> Tensor:
        """Map times t (B,) in [0, 1] to (B, D) in the dtype of the weights; the features are made in float32."""
        half = self.width // 2
        decay = torch.exp(-math.log(_THETA) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = self.scale * (t[:, None] * decay)  # in this order, as the published network multiplies
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedded: Tensor = self.norm(self.mlp(features.to(self.norm.weight.dtype)))
        return embedded


class _FinalLayer(nn.Module):
    """Scale and shift by time, and the linear map to patches; starts at zero."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features, bias=False)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map x (B, N, D), with c (B, D) after SiLU, to patches (B, N, p p C)."""
        scale, shift = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.linear(_layer_norm(x) * (1 + scale) + shift)
        return out


def _layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return functional.layer_norm(x, x.shape[-1:], eps=_EPS)


def _squash(gate: Tensor) -> Tensor:
    return gate.clamp(-_LARGEST_GATE, _LARGEST_GATE).tanh()


def _rotary(axes: tuple[int, int, int], grid: tuple[int, int], text: int, device: torch.device) -> Tensor:
    """Return cosines and sines (2, h w + text, head_width / 2) float32 of an image's tokens, then of its text tokens.

    Image tokens are in frame 0, rows and columns are counted from the centre; text tokens follow on the diagonal beyond
    the farther edge. Computed at each call, because a buffer would be saved.
    """
    h, w = grid
    rows = torch.arange(h, device=device) - (h - h // 2)
    columns = torch.arange(w, device=device) - (w - w // 2)
    image = torch.stack([torch.zeros(h, w, device=device), *torch.meshgrid(rows, columns, indexing="ij")], dim=-1)
    diagonal = max(h // 2, w // 2) + torch.arange(text, device=device)
    places = torch.cat([image.flatten(0, 1), diagonal[:, None].expand(-1, 3).float()])  # (h w + text, 3)
    frequencies = [1 / _THETA ** (torch.arange(0, width, 2, device=device).float() / width) for width in axes]
    angle = torch.cat([places[:, axis : axis + 1] * frequency for axis, frequency in enumerate(frequencies)], dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate heads x (B, N, heads, head_width) by `_rotary` positions (2, N, head_width / 2); pairs are neighbours."""
    first, second = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unsqueeze(2)  # each (N, 1, head_width / 2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)
