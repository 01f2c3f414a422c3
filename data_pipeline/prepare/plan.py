"""What is written where: the resolutions of a folder, its shards, and which rank writes which shard.

Aspect buckets are resolutions that all have the same number of tokens.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.encode.codecs import ImageSize
from data_pipeline.index import bucket_name
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog
from data_pipeline.sources.images import is_enlarged
from sharpmoe.errors import DataError

_WIDEST = 3.0  # long side to short side, of a table made from a number of tokens
_SMALL = 64  # training images; a bucket with fewer is reported
_LatentShape = Callable[[ImageSize], tuple[int, int, int]]


class Resolution(NamedTuple):
    """The sizes of one bucket."""

    image: tuple[int, int]  # pixels (H, W)
    latent: tuple[int, int, int]  # (C, h, w)
    grid: tuple[int, int]  # tokens (h, w)

    @property
    def name(self) -> str:
        return bucket_name(self.image)


def bucket_resolutions(spec: str, image_size: int, patch_size: int, latent_shape: _LatentShape) -> list[Resolution]:
    """Return the requested buckets, in the order of the list, or from tall to wide.

    Args:
        spec: "" for one square of `image_size`, a number of tokens for every grid of so many tokens whose sides differ
            by at most a factor of 3, or a list of resolutions H x W in pixels as `64x64,48x80`.
        image_size: side of the square, in pixels.
        patch_size: latent pixels per token, each way.
        latent_shape: that of the codec.

    Raises:
        DataError: a side does not divide, two resolutions differ in tokens, or the spec is of another form.
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
        raise DataError(f"buckets {spec}: a resolution is listed twice")
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


def _pixels_per_token(image_size: int, patch_size: int, latent_shape: _LatentShape) -> int:
    _, height, _ = latent_shape(image_size)
    return image_size // height * patch_size


def _resolution(image: tuple[int, int], patch_size: int, latent_shape: _LatentShape) -> Resolution:
    latent = latent_shape(image)
    _, height, width = latent
    if height % patch_size or width % patch_size:
        raise DataError(f"patch size {patch_size} does not divide the {height}x{width} latent")
    return Resolution(image, latent, (height // patch_size, width // patch_size))


def nearest_buckets(pixels: np.ndarray, resolutions: list[Resolution]) -> np.ndarray:
    """Return the bucket whose shape is closest to each image, by the logarithm of height to width.

    Args:
        pixels: (n, 2) heights and widths.
        resolutions: the buckets; the first wins a tie.

    Returns:
        (n,) int16 indices into `resolutions`.
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


def bucket_lines(
    resolutions: list[Resolution], chosen: np.ndarray, pixels: np.ndarray, train: np.ndarray, fit: str = "crop"
) -> list[str]:
    """Return one line per bucket: images, those of the training split, those that are enlarged; then a warning.

    Args:
        resolutions: the buckets.
        chosen: (n,) indices into `resolutions`.
        pixels: (n, 2) heights and widths of the images, 0 where they were not read.
        train: (n,) bool, images of the training split.
        fit: crop or pad.
    """
    lines, small = [], []
    for number, entry in enumerate(resolutions):
        here = chosen == number
        count, trained = int(here.sum()), int((here & train).sum())
        enlarged = int((here & (pixels > 0).all(1) & is_enlarged(pixels, entry.image, fit)).sum())
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


class ShardPlan(NamedTuple):
    """One shard to be written."""

    name: str
    split: str
    resolution: Resolution
    rows: np.ndarray  # indices into the catalog
    digest: str  # hash of its images, which decides the rank that writes it


def shard_plans(
    catalog: Catalog, resolutions: list[Resolution], chosen: np.ndarray, shard_samples: int
) -> list[ShardPlan]:
    """Return all shards of all splits and buckets, in the order in which the index lists them."""
    return [
        ShardPlan(name, split, resolution, rows, _digest(name, catalog, rows))
        for split in sorted(catalog.split_names)
        for number, resolution in enumerate(resolutions)
        for name, rows in _slices(
            split if len(resolutions) == 1 else f"{split}-{resolution.name}",
            np.flatnonzero((catalog.split == catalog.split_names.index(split)) & (chosen == number)),
            shard_samples,
        )
    ]


def _slices(stem: str, rows: np.ndarray, size: int) -> list[tuple[str, np.ndarray]]:
    return [
        (f"{stem}-{number:05d}", rows[start : start + size]) for number, start in enumerate(range(0, len(rows), size))
    ]


def _digest(name: str, catalog: Catalog, rows: np.ndarray) -> str:
    held = catalog.hash[rows].tobytes() + catalog.use[rows].astype(np.int64).tobytes()
    return hashlib.sha256(name.encode() + held).hexdigest()


def plans_of_rank(every: list[ShardPlan], place: Rank) -> list[ShardPlan]:
    """Return one rank's shards, dealt in turn in the order of their hash: every rank gets some of each split."""
    dealt = {plan.name for plan in sorted(every, key=lambda plan: plan.digest)[place.rank :: place.size]}
    return [plan for plan in every if plan.name in dealt]
