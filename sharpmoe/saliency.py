"""The saliency map M of a clean image, on the model's token grid."""

import torch
from torch import Tensor
from torch.nn import functional

_LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def saliency_map(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """|Laplacian| of clean images, mean over channels, average-pooled to tokens: M of SharpMoE (arXiv 2606.26938).

    Args:
        images: (B, 3, H, W) float, values in [-1, 1], at the resolution the model is trained on.
        grid: (h, w) of the model's tokens; must divide (H, W).

    Returns:
        (B, h * w) float32 in [0, 1], row-major: the mean |Laplacian| of a token's pixels, for an image scaled to
        [0, 1]. Not normalised per image: a flat image has a map of zeros, and maps of different images are comparable.
        Only pixel noise close to a checkerboard exceeds 1 and is cut there. Borders are replicated, so the frame of a
        picture is not an edge.
    """
    levels = (images.float() + 1) / 2
    channels = levels.shape[1]
    padded = functional.pad(levels, (1, 1, 1, 1), mode="replicate")
    kernel = _LAPLACIAN.to(levels.device).expand(channels, 1, 3, 3)
    edges = functional.conv2d(padded, kernel, groups=channels).abs().mean(dim=1, keepdim=True)
    return _pool(edges, grid).clamp_(0, 1)


def token_mask(alpha: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of every token that is foreground.

    Args:
        alpha: (B, 1, H, W) float, values in [0, 1].
        grid: (h, w) of the model's tokens; must divide (H, W).

    Returns:
        (B, h * w) float32 in [0, 1], row-major.
    """
    return _pool(alpha.float(), grid).clamp_(0, 1)


def _pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average (B, 1, H, W) over the pixels of each token: (B, h * w)."""
    height, width = maps.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a {height}x{width} image cannot be pooled to a {grid[0]}x{grid[1]} token grid")
    return functional.avg_pool2d(maps, (height // grid[0], width // grid[1])).flatten(1)
