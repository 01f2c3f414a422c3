"""Embedders: patches, time, class labels, text."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.latent_patches import patchify
from sharpmoe.model.backbone import TextCondition

FREQUENCIES = 256  # width of the sinusoidal time features in every published DiT


class PatchEmbed(nn.Module):
    """Linear map of p x p patches to tokens, row-major over the grid."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(channels * patch_size**2, width)

    def forward(self, latent: Tensor) -> Tensor:
        """Map a latent (B, C, [T,] H, W) to tokens (B, N, D)."""
        return self.proj(patchify(latent, self.patch_size))


def sincos_positions(width: int, grid: tuple[int, int], side: int, device: torch.device | None = None) -> Tensor:
    """Return fixed 2-D sine-cosine positions (1, h w, width) float32, as in MAE and DiT: half for x, half for y.

    Another grid than (side, side), smaller or larger, is centred on it with the same distance between tokens: the
    middle of an image has one position in every aspect ratio, and no axis is stretched. Beyond the square positions are
    extrapolated, not interpolated (docs/design/0011-aspect-buckets.md).
    """
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4))
    axes = []
    for tokens in grid:
        place = torch.arange(tokens, dtype=torch.float64, device=device) + (side - tokens) / 2
        angle = place[:, None] * omega  # (tokens, width / 4)
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))  # (tokens, width / 2)
    along_x = axes[1][None, :].expand(*grid, -1)
    along_y = axes[0][:, None].expand(*grid, -1)
    return torch.cat([along_x, along_y], dim=-1).reshape(1, grid[0] * grid[1], width).float()


def add_frame_positions(spatial: Tensor, frames: int) -> Tensor:
    """Return fixed positions (1, T h w, D) of `frames` frames from those of one, `sincos_positions` (1, h w, D).

    To every position of frame f is added (sin f w_i, cos f w_i - 1), i < D / 2: zero at the first frame, so that a
    latent of one frame has exactly the positions of a still one. Frames count from the first, and more frames than a
    model has seen go on in the same way (they are extrapolated).
    """
    width, device = spatial.shape[-1], spatial.device
    omega = 10000 ** -(torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2))
    angle = torch.arange(frames, dtype=torch.float64, device=device)[:, None] * omega  # (T, D / 2)
    moved = torch.cat([angle.sin(), angle.cos() - 1], dim=1).float()
    return (spatial[:, None] + moved[None, :, None]).flatten(1, 2)


def rotary_positions(head_width: int, grid: tuple[int, int], kind: str, device: torch.device) -> Tensor:
    """Return cosines and sines (2, h w, head_width) float32 of rotary positions (arXiv 2104.09864) on a grid (h, w).

    rope_2d: the first half of a head rotates with the row, the second with the column, as in DSMoE; rope_1d: the whole
    head rotates with the token's place in the sequence. On a larger grid the angles go on (they are extrapolated).
    """
    axes = 2 if kind == "rope_2d" else 1
    quarter = head_width // axes // 2
    frequency = 10000 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    place = torch.arange(grid[0] * grid[1], device=device)
    places = torch.stack([place // grid[1], place % grid[1]] if axes == 2 else [place], dim=1)  # (N, axes)
    angle = (places[..., None] * frequency)[:, :, None].expand(-1, -1, 2, -1).reshape(len(place), head_width)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor, axes: int) -> Tensor:
    """Rotate heads x (B, heads, N, head_width) by `rotary_positions`; pairs are half an axis apart."""
    first, second = x.unflatten(-1, (axes, 2, -1)).unbind(-2)
    rotated = torch.stack([-second, first], dim=-2).flatten(-3)
    return (x * rope[0] + rotated * rope[1]).to(x.dtype)


class TimeEmbed(nn.Module):
    """Sinusoidal features of scale * t + shift, then a two-layer SiLU MLP."""

    def __init__(self, width: int, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        """Map times t (B,) in [0, 1] to (B, D) in the dtype of the weights; the features are made in float32."""
        half = FREQUENCIES // 2
        decay = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = (self.scale * t + self.shift)[:, None] * decay
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        embedded: Tensor = self.mlp(features.to(self.dtype))
        return embedded


class LabelEmbed(nn.Module):
    """Class table, with one more row for "no class" where classes can be dropped."""

    def __init__(self, num_classes: int, width: int, with_null: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + int(with_null), width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels (B,) to (B, D)."""
        embedded: Tensor = self.table(labels)
        return embedded


class TextEmbed(nn.Module):
    """Text states to trunk width: token states for cross-attention, pooled text for the modulation."""

    def __init__(self, text_width: int, pooled_width: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(text_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.pooled = nn.Sequential(nn.Linear(pooled_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, condition: TextCondition) -> tuple[Tensor, Tensor]:
        """Return (token states (B, L, D), pooled (B, D)) in the dtype of the weights."""
        if condition.pooled is None:
            raise ValueError(
                "TextCondition.pooled is None; this model needs a pooled state (B, D_pooled) beside tokens"
            )
        dtype = next(self.parameters()).dtype
        return self.tokens(condition.tokens.to(dtype)), self.pooled(condition.pooled.to(dtype))


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask (B, L) bool into what attention adds to its scores, (B, 1, 1, L): 0 or, where masked, -inf.

    At least one True per row. Attention would do the same to a mask, to the same bits, in every block; and fused
    attention on CUDA would copy rows that do not begin at multiples of 16 numbers.
    """
    images, length = mask.shape
    rows = mask.new_full((images, -(-length // 16) * 16), -torch.inf, dtype=dtype)[:, :length]
    return rows.masked_fill_(mask, 0)[:, None, None, :]


class CrossAttention(nn.Module):
    """Image tokens attend to text tokens; the output layer starts at zero, so a class trunk can be extended to text."""

    matrices: ClassVar = {"q.weight": 1, "kv.weight": 2, "proj.weight": 1}

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> Tensor:
        """Compute keys and values (B, L, 2 D) of text (B, L, D); they depend on the text only, not on the step."""
        projected: Tensor = self.kv(text)
        return projected

    def forward(self, x: Tensor, text: Tensor, bias: Tensor, keys_values: Tensor | None = None) -> Tensor:
        """Map x (B, N, D) to (B, N, D), given text (B, L, D) and the `attention_bias` (B, 1, 1, L) of its mask.

        keys_values: what `keys_values` returned for this text; computed here where it is not given.
        """
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.num_heads, -1).transpose(1, 2)
        keys_values = self.keys_values(text) if keys_values is None else keys_values
        k, v = keys_values.view(b, text.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(b, n, d))
        return mixed
