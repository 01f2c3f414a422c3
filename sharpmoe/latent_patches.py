"""Latents as patches, row-major over the grid, and back."""

from torch import Tensor


def patchify(latent: Tensor, patch: int) -> Tensor:
    """Cut a latent (B, C, H, W) into patches (B, N, C p p), features in (channel, row, column) order."""
    b, c, h, w = latent.shape
    x = latent.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """Join patches (B, h w, p p C), features in (row, column, channel) order, to a latent (B, C, h p, w p)."""
    height, width = grid
    x = tokens.view(len(tokens), height, width, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(tokens), channels, height * patch, width * patch)
