"""The backbone: one diffusion transformer; router family and conditioning are fields of its configuration.

DiT (arXiv 2212.09748) with adaLN-Zero blocks; an MoE layer replaces the MLP of every second block (odd indices).
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sharpmoe.config import ModelConfig
from sharpmoe.model.embed import (
    ClassCondition,
    Condition,
    CrossAttention,
    LabelEmbed,
    PatchEmbed,
    TextCondition,
    TextEmbed,
    TimeEmbed,
    sincos_positions,
    unpatchify,
)
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.router import at_least_float32
from sharpmoe.moe.routing import Routing

# The model starts as an identity of its trunk, and a freshly attached part leaves it as it was.
ZERO_INITIALISED = ("modulation.", "cross_attn.proj.", "saliency_router.out.", "final_layer.linear.")


class ModelOutput(NamedTuple):
    """What one denoising call returns."""

    v: Tensor  # (B, C, H, W) predicted velocity, float32 or better
    routing: tuple[Routing, ...]  # one per MoE layer, in depth order; empty for a dense model


class TextContext(NamedTuple):
    """Embedded caption tokens that every block attends to."""

    tokens: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x (B, N, D) * (1 + scale) + shift, with shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, eps 1e-6."""
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, D) to (B, N, D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(b, n, d))
        return mixed


class Mlp(nn.Module):
    """Two-layer GELU(tanh) MLP of the dense blocks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, D) to (B, N, D)."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """adaLN-Zero block: self-attention, cross-attention to text where there is text, then MLP or MoE."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.num_heads)
        self.cross_attn = CrossAttention(config.width, config.num_heads) if config.conditioning == "text" else None
        is_moe = config.router != "dense" and index % 2 == 1
        self.moe = MoELayer(config) if is_moe else None
        self.mlp = None if is_moe else Mlp(config.width, int(config.width * config.mlp_ratio))
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(
        self, x: Tensor, c: Tensor, text: TextContext | None, guidance_tokens: Tensor | None, routing_map: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """X (B, N, D), c (B, D) after SiLU; returns the tokens and, from an MoE block, the routing record."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(layer_norm(x), shift_a, scale_a))
        if self.cross_attn is not None and text is not None:
            x = x + self.cross_attn(layer_norm(x), text.tokens, text.mask)
        h = modulate(layer_norm(x), shift_m, scale_m)
        if self.moe is not None:
            y, routing = self.moe(h, guidance_tokens, routing_map)
            return x + gate_m.unsqueeze(1) * y, routing
        assert self.mlp is not None
        return x + gate_m.unsqueeze(1) * self.mlp(h), None


class FinalLayer(nn.Module):
    """adaLN and the linear map to patches; starts at zero."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (B, N, D), c (B, D) after SiLU; returns (B, N, p p C)."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(layer_norm(x), shift, scale))
        return out


class DiT(nn.Module):
    """Diffusion transformer with mixture-of-experts layers and saliency routers."""

    pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch_size, config.width)
        self.t_embedder = TimeEmbed(config.width, config.time_scale, config.time_shift)
        is_text = config.conditioning == "text"
        self.text_embedder = TextEmbed(config.text_width, config.pooled_width, config.width) if is_text else None
        self.y_embedder = None if is_text else LabelEmbed(config.num_classes, config.width, config.class_dropout)
        side = config.latent_size // config.patch_size
        self.register_buffer("pos_embed", sincos_positions(config.width, side))
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.depth)])
        out_channels = config.latent_channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(config.width, config.patch_size**2 * out_channels)
        initialise(self)

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return self.config.num_tokens

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in depth order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        routing_maps: tuple[Tensor, ...] | None = None,
        recompute: bool = False,
    ) -> ModelOutput:
        """Predict the velocity at x_t (B, C, H, W), t (B,) in [0, 1], 0 = data.

        guidance (B, C, H, W): clean latent predicted by the previous step, detached here; None gives the base routing.
        routing_maps: per MoE layer (B, N, E) bool, choices to replay. recompute: keep only block inputs for backward
        (non-reentrant; the reentrant form gives wrong gradients under ZeRO-3). Returns float32 or better.
        """
        tokens = self._embed(x_t)
        guidance_tokens = None if guidance is None else self._embed(guidance.detach())
        c, text = self._condition(t, condition)
        records: list[Routing] = []
        for block in self.blocks:
            replay = routing_maps[len(records)] if routing_maps is not None and block.moe is not None else None
            inputs = (tokens, c, text, guidance_tokens, replay)
            tokens, routing = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if routing is not None:
                records.append(routing)
        return ModelOutput(self._velocity(self.final_layer(tokens, c)), tuple(records))

    def _embed(self, latent: Tensor) -> Tensor:
        tokens = self.x_embedder(latent.to(self.x_embedder.proj.weight.dtype))
        return tokens + self.pos_embed.to(tokens.dtype)

    def _condition(self, t: Tensor, condition: Condition) -> tuple[Tensor, TextContext | None]:
        c = self.t_embedder(t)
        text = None
        if self.text_embedder is not None:
            if not isinstance(condition, TextCondition):
                raise TypeError(f"a text-conditional model takes a TextCondition, got {type(condition).__name__}")
            tokens, pooled = self.text_embedder(condition)
            c, text = c + pooled, TextContext(tokens, condition.mask)
        elif self.y_embedder is not None:
            if not isinstance(condition, ClassCondition):
                raise TypeError(f"a class-conditional model takes a ClassCondition, got {type(condition).__name__}")
            c = c + self.y_embedder(condition.labels)
        return functional.silu(c), text

    def _velocity(self, tokens: Tensor) -> Tensor:
        out_channels = tokens.shape[-1] // self.config.patch_size**2
        raw = unpatchify(tokens, self.config.patch_size, out_channels)
        return at_least_float32(raw[:, : self.config.latent_channels])  # learn_sigma: the rest is not used


def initialise(model: DiT) -> None:
    """DiT's initialisation: Xavier linears, zero biases, zero adaLN, cross-attention and final outputs, zero R_sal."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.t_embedder.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
    if model.y_embedder is not None:
        nn.init.normal_(model.y_embedder.table.weight, std=0.02)
    for moe in model.moe_layers():
        for expert in range(moe.config.num_experts):
            nn.init.xavier_uniform_(moe.experts.w1[expert])
            nn.init.xavier_uniform_(moe.experts.w2[expert])
    for name, parameter in model.named_parameters():
        if any(part in name for part in ZERO_INITIALISED):
            nn.init.zeros_(parameter)


def count_parameters(model: DiT) -> tuple[int, int]:
    """Count parameters (total, active per token): an expert counts active in proportion to its mean share of tokens.

    Positions are counted, thresholds are not, as in the published figures.
    """
    total = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
    idle = 0.0
    for moe in model.moe_layers():
        expert_parameters = sum(p.numel() for p in moe.experts.parameters())
        per_token = moe.config.top_k if moe.config.router == "tc" else moe.config.capacity
        idle += expert_parameters * (1 - per_token / moe.config.num_experts)
    return total, round(total - idle)
