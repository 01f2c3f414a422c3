"""Aspect buckets: a table of resolutions that all have the same number of tokens."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.index import bucket_name
from data_pipeline.sizes import ImageSize
from sharpmoe.errors import DataError

_WIDEST = 3.0  # long side to short side, of a table made from a number of tokens
_SMALL = 64  # training pictures of a bucket below which it is reported
LatentShape = Callable[[ImageSize], tuple[int, int, int]]


class Resolution(NamedTuple):
    """One bucket's sizes."""

    image: tuple[int, int]  # pixels (H, W)
    latent: tuple[int, int, int]  # (C, h, w)
    grid: tuple[int, int]  # tokens (h, w)

    @property
    def name(self) -> str:
        """As it stands in the names of shards."""
        return bucket_name(self.image)


def table(spec: str, image_size: int, patch_size: int, latent_shape: LatentShape) -> list[Resolution]:
    """The buckets that are asked for, in the order of the list, or from tall to wide.

    Args:
        spec: "" for one square of `image_size`, a number of tokens for every grid of so many tokens whose sides differ
            by at most a factor of 3, or a list of resolutions H x W in pixels as `64x64,48x80`.
        image_size: side of the square, in pixels.
        patch_size: latent pixels per token, each way.
        latent_shape: of the codec.

    Raises:
        DataError: a resolution does not divide, two differ in their number of tokens, or the spec is none of these.
    """
    if not spec:
        return [_resolution((image_size, image_size), patch_size, latent_shape)]
    if spec.isdigit():
        step = _pixels_per_token(image_size, patch_size, latent_shape)
        return [_resolution((h * step, w * step), patch_size, latent_shape) for h, w in _grids(int(spec))]
    found = [_resolution(_parsed(part, spec), patch_size, latent_shape) for part in spec.split(",")]
    tokens = {resolution.grid[0] * resolution.grid[1] for resolution in found}
    if len(tokens) > 1:
        counts = ", ".join(f"{entry.name} has {entry.grid[0] * entry.grid[1]}" for entry in found)
        raise DataError(f"buckets {spec}: all need the same number of tokens, but {counts}")
    if len(set(found)) < len(found):
        raise DataError(f"buckets {spec}: a resolution stands in it twice")
    return found


def _parsed(part: str, spec: str) -> tuple[int, int]:
    height, cross, width = part.strip().lower().partition("x")
    if not cross or not height.isdigit() or not width.isdigit() or not int(height) or not int(width):
        raise DataError(f"buckets {spec!r}: expected a number of tokens, or a list as 64x64,48x80 (H x W pixels)")
    return int(height), int(width)


def _grids(tokens: int) -> list[tuple[int, int]]:
    widest = _WIDEST + 1e-9
    grids = [(tokens // w, w) for w in range(1, tokens + 1) if tokens % w == 0]
    good = [(h, w) for h, w in grids if max(h / w, w / h) <= widest]
    if not good:
        raise DataError(
            f"buckets {tokens}: no grid of {tokens} tokens is within 1:{_WIDEST:g}; take a number such as 240"
        )
    return good


def _pixels_per_token(image_size: int, patch_size: int, latent_shape: LatentShape) -> int:
    _, height, _ = latent_shape(image_size)
    return image_size // height * patch_size


def _resolution(image: tuple[int, int], patch_size: int, latent_shape: LatentShape) -> Resolution:
    latent = latent_shape(image)
    _, height, width = latent
    if height % patch_size or width % patch_size:
        raise DataError(f"patch size {patch_size} does not divide the {height}x{width} latent")
    return Resolution(image, latent, (height // patch_size, width // patch_size))


def choose(pixels: np.ndarray, resolutions: list[Resolution]) -> np.ndarray:
    """The bucket whose shape is closest, by the logarithm of height to width.

    Args:
        pixels: (n, 2) heights and widths.
        resolutions: the buckets; the first wins a tie.

    Returns:
        (n,) int16 places in `resolutions`.
    """
    if len(resolutions) == 1:
        return np.zeros(len(pixels), np.int16)
    shapes = np.array([math.log(entry.image[0] / entry.image[1]) for entry in resolutions])
    found = np.log(pixels[:, 0] / pixels[:, 1])
    best = np.zeros(len(pixels), np.int16)
    distance = np.full(len(pixels), np.inf)
    for number, shape in enumerate(shapes):
        closer = np.abs(found - shape) < distance - 1e-9
        best[closer], distance[closer] = number, np.abs(found - shape)[closer]
    return best


def report(resolutions: list[Resolution], chosen: np.ndarray, pixels: np.ndarray, train: np.ndarray) -> list[str]:
    """One line per bucket: pictures, those of the training split, those that have to be enlarged; warnings below.

    Args:
        resolutions: the buckets.
        chosen: (n,) places in `resolutions`.
        pixels: (n, 2) heights and widths of the pictures, 0 where they were not looked at.
        train: (n,) bool, pictures of the training split.
    """
    lines, small = [], []
    for number, entry in enumerate(resolutions):
        here = chosen == number
        count, trained = int(here.sum()), int((here & train).sum())
        enlarged = int((here & (pixels > 0).all(1) & (pixels < entry.image).any(1)).sum())
        tokens = f"{entry.grid[0]}x{entry.grid[1]} tokens"
        lines.append(f"bucket {entry.name} ({tokens}): {count} pictures, {trained} to train on, {enlarged} enlarged")
        if len(resolutions) > 1 and trained < _SMALL:
            small.append(f"{entry.name} ({trained})")
    if small:
        lines.append(
            f"small buckets, below {_SMALL} pictures to train on: {', '.join(small)}; a bucket smaller than a global "
            "batch repeats its pictures within a batch: leave it out of --buckets, or add pictures of its shape"
        )
    return lines
