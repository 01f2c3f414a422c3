"""Latents as patches, row-major over the grid, and back.

A grid is (h, w) tokens of a still latent (C, H, W), or (T, h, w) of one with frames (C, T, H, W): a token is a patch of
one frame, and tokens are in the order (frame, row, column).
"""

import math

from torch import Tensor

Grid = tuple[int, ...]  # tokens (h, w), or (T, h, w)


def patchify(latent: Tensor, patch: int) -> Tensor:
    """Cut a latent (B, C, [T,] H, W) into patches (B, N, C p p), features in (channel, row, column) order."""
    b, c, *frames, h, w = latent.shape
    x = latent.view(b, c, *frames, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 3, 5, 1, 4, 6) if frames else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, math.prod(frames) * (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, channels: int, grid: Grid) -> Tensor:
    """Join patches (B, N, p p C), features in (row, column, channel) order, to a latent (B, C, [T,] h p, w p)."""
    *frames, height, width = grid
    x = tokens.view(len(tokens), *grid, patch, patch, channels)
    x = x.permute(0, 6, 1, 2, 4, 3, 5) if frames else x.permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(tokens), channels, *frames, height * patch, width * patch)
