"""The saliency map M of a clean image, on the model's token grid, and the scale that makes a target of it."""

import math
from collections.abc import Sequence

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


def entropy_share(maps: Sequence[Tensor], scale: float) -> float:
    """Return the entropy of softmax(scale * M) over the tokens of an image as a share of log N, mean over images.

    maps: (I, N) each, one per number of tokens N > 1.
    """
    shares = []
    for each in maps:
        log_p = (scale * each.double()).log_softmax(-1)
        shares.append(-(log_p.exp() * log_p).sum(-1) / math.log(each.shape[1]))
    return float(torch.cat(shares).mean())


def scale_for_entropy(maps: Sequence[Tensor], share: float) -> float:
    """Return the scale at which `entropy_share` of `maps` is `share` in (0, 1), to six digits.

    The entropy falls from log N at scale 0 with the scale. Raises ValueError where no scale up to 1e6 reaches it:
    an image without edges has the entropy log N at any scale.
    """
    low, high = 1e-6, 1e6
    if (least := entropy_share(maps, high)) > share:
        raise ValueError(f"no scale makes the entropy of softmax(scale * M) less than {least:.3g} of log N")
    for _ in range(64):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy_share(maps, middle) > share else (low, middle)
    return float(f"{math.sqrt(low * high):.6g}")


def _pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average (B, 1, H, W) over the pixels of each token: (B, h * w)."""
    height, width = maps.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a {height}x{width} image cannot be pooled to a {grid[0]}x{grid[1]} token grid")
    return functional.avg_pool2d(maps, (height // grid[0], width // grid[1])).flatten(1)
