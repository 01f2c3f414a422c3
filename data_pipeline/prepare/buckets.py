"""The resolutions of a folder: one square, or aspect buckets, and which bucket every image goes to.

Buckets may differ in their number of tokens: a batch is of one bucket, and a model follows the grid of its batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.encode.codecs import ImageSize
from data_pipeline.index import MAX_TOKENS, bucket_name
from data_pipeline.sources.images import is_enlarged
from sharpmoe.errors import DataError

_WIDEST = 3.0  # long side to short side, of a table made from a number of tokens or a base
_SMALL = 64  # training images; a bucket with fewer is reported
_MAX_PIXELS = 64_000_000  # of one resolution: no source image has more
_MAX_BUCKETS = 256
_LatentShape = Callable[[ImageSize], tuple[int, int, int]]
_FORMS = "expected a list as 64x64,48x80 (H x W pixels), a number of tokens, or a side in pixels with --bucket-step"


class Resolution(NamedTuple):
    """The sizes of one bucket."""

    image: tuple[int, int]  # pixels (H, W)
    latent: tuple[int, ...]  # (C, h, w), or of frames (C, T, h, w)
    grid: tuple[int, ...]  # tokens (h, w), or (T, h, w)

    @property
    def name(self) -> str:
        return bucket_name(self.image, self.grid[0] if len(self.grid) == 3 else 1)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def with_frames(self, frames: int) -> "Resolution":
        """Return the sizes of clips of so many images. Raises DataError where that is more tokens than are taken."""
        if frames == 1:
            return self
        channels, *sides = self.latent
        clip = self._replace(latent=(channels, frames, *sides), grid=(frames, *self.grid))
        if clip.tokens > MAX_TOKENS:
            raise DataError(
                f"--frames {frames}: a clip of {bucket_name(self.image)} pixels has {clip.tokens} tokens, at most "
                f"{MAX_TOKENS} are taken"
            )
        return clip


def bucket_resolutions(
    spec: str, image_size: int, patch_size: int, latent_shape: _LatentShape, step: int | None = None
) -> list[Resolution]:
    """Return the requested buckets, in the order of the list, or from tall to wide.

    Args:
        spec: "" for one square of `image_size`; a list of resolutions H x W in pixels as `64x64,48x80`; with `step`,
            the side in pixels of a square whose area no bucket exceeds; without, a number of tokens, for every grid
            of so many tokens within 1:3.
        image_size: side of the square, in pixels.
        patch_size: latent pixels per token, each way.
        latent_shape: that of the codec.
        step: sides of buckets are multiples of so many pixels.

    Raises:
        DataError: a side does not divide or is out of bounds, or the spec is of another form.
    """
    check_buckets(spec, step)
    if not spec:
        return [_resolution((image_size, image_size), patch_size, latent_shape)]
    if step is not None:
        return _of_base(int(spec), step, patch_size, latent_shape)
    if _is_number(spec):
        pixels = _pixels_per_token(image_size, patch_size, latent_shape)
        return [_resolution((h * pixels, w * pixels), patch_size, latent_shape) for h, w in _grids(int(spec))]
    return [_resolution(image, patch_size, latent_shape) for image in listed_sizes(spec)]


def check_buckets(spec: str, step: int | None = None) -> None:
    """Raise a DataError where buckets are of no known form, or out of bounds; no codec is needed."""
    shown = spec if step is None else f"{spec} --bucket-step {step}"
    if step is not None and not _is_number(spec):
        raise DataError(
            f"--bucket-step {step}: needs the side of a square in pixels, as --buckets 512 --bucket-step 64; "
            f"--buckets is {spec!r}"
        )
    if _is_number(spec) and not 0 < int(spec) <= (MAX_TOKENS if step is None else math.isqrt(_MAX_PIXELS)):
        most = f"{MAX_TOKENS} tokens" if step is None else f"{math.isqrt(_MAX_PIXELS)} pixels"
        raise DataError(f"--buckets {shown}: expected 1 to {most}")
    if step is not None and not 0 < step <= int(spec):
        raise DataError(f"--buckets {shown}: expected a step from 1 to the side of {spec} pixels")
    if spec and not _is_number(spec):
        listed_sizes(spec)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def listed_sizes(spec: str) -> list[tuple[int, int]]:
    """Return the sizes (H, W) in pixels of a list as `64x64,48x80`. Raises DataError where it is not one."""
    sizes = [_parsed(part, spec) for part in spec.split(",")]
    if len(set(sizes)) < len(sizes):
        raise DataError(f"--buckets {spec}: a resolution is listed twice")
    if len(sizes) > _MAX_BUCKETS:
        raise DataError(f"--buckets: {len(sizes)} resolutions, at most {_MAX_BUCKETS} are taken")
    return sizes


def _parsed(part: str, spec: str) -> tuple[int, int]:
    height, cross, width = part.strip().lower().partition("x")
    if not cross or not _is_number(height) or not _is_number(width) or not int(height) or not int(width):
        raise DataError(f"--buckets {spec!r}: {_FORMS}")
    if int(height) * int(width) > _MAX_PIXELS:
        raise DataError(
            f"--buckets {part.strip()}: more than {_MAX_PIXELS // 1_000_000} megapixels, which are the most"
        )
    return int(height), int(width)


def _of_base(base: int, step: int, patch_size: int, latent_shape: _LatentShape) -> list[Resolution]:
    """Return the buckets of a base, from tall to wide. Raises DataError where the step does not divide into tokens."""
    spec = f"--buckets {base} --bucket-step {step}"
    try:
        _resolution((step, step), patch_size, latent_shape)
    except DataError as error:
        raise DataError(f"{spec}: a step must be a whole number of tokens; {error}") from None
    sizes = sorted(_table(base, step), key=lambda size: (-size[0] / size[1], size))
    if len(sizes) > _MAX_BUCKETS:
        raise DataError(f"{spec}: gives {len(sizes)} buckets, at most {_MAX_BUCKETS} are taken; raise --bucket-step")
    return [_resolution(size, patch_size, latent_shape) for size in sizes]


def _table(base: int, step: int) -> set[tuple[int, int]]:
    """Return sizes (H, W) as kohya's sd-scripts have them, within 1:3.

    The largest square, and for every width the largest height with which the area is at most that of the base; each
    also on its side.
    """
    side = base // step * step
    sizes = {(side, side)}
    for width in range(step, math.isqrt(int(_WIDEST * base * base)) + 1, step):
        height = base * base // width // step * step
        if height and max(height, width) <= _WIDEST * min(height, width):
            sizes |= {(height, width), (width, height)}
    return sizes


def _grids(tokens: int) -> list[tuple[int, int]]:
    widest = _WIDEST + 1e-9
    grids = [(tokens // w, w) for w in range(1, tokens + 1) if tokens % w == 0]
    good = [(h, w) for h, w in grids if max(h / w, w / h) <= widest]
    if not good:
        raise DataError(
            f"--buckets {tokens}: no grid of {tokens} tokens is within 1:{_WIDEST:g}; take a number such as 240, or "
            f"add --bucket-step 64 where {tokens} are pixels"
        )
    return good


def _pixels_per_token(image_size: int, patch_size: int, latent_shape: _LatentShape) -> int:
    _, height, _ = latent_shape(image_size)
    return image_size // height * patch_size


def _resolution(image: tuple[int, int], patch_size: int, latent_shape: _LatentShape) -> Resolution:
    latent = latent_shape(image)
    _, height, width = latent
    if height % patch_size or width % patch_size:
        raise DataError(
            f"image size {bucket_name(image)}: patch size {patch_size} does not divide the {height}x{width} latent; "
            f"sides must be multiples of {image[0] // height * patch_size} pixels"
        )
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
    """Return one line per bucket: images, those of the training split; enlarged and cut ones where sizes are known.

    Args:
        resolutions: the buckets.
        chosen: (n,) indices into `resolutions`.
        pixels: (n, 2) heights and widths of the images, 0 where they were not read.
        train: (n,) bool, images of the training split.
        fit: crop or pad.
    """
    lines, used = [], []  # used: (name, training images) of buckets that have any
    for number, entry in enumerate(resolutions):
        here = chosen == number
        trained = int((here & train).sum())
        known = pixels[here & (pixels > 0).all(1)]
        enlarged = f", {int(is_enlarged(known, entry.image, fit).sum())} enlarged" if pixels.any() else ""
        lost = f", {_lost(known, entry.image):.1%} {'cut off' if fit == 'crop' else 'white bars'}" if len(known) else ""
        tokens = f"{'x'.join(map(str, entry.grid))} = {entry.tokens} tokens"
        lines.append(
            f"bucket {entry.name} ({tokens}): {int(here.sum())} pictures, {trained} to train on{enlarged}{lost}"
        )
        used += [(entry.name, trained)] if here.any() else []
    return lines + _small_buckets(used)


def _lost(pixels: np.ndarray, size: tuple[int, int]) -> float:
    """Return which share of images (n, 2) is cropped to the shape of `size`; padded, so much of the result is bars."""
    ratio = (pixels[:, 0] / pixels[:, 1]) / (size[0] / size[1])
    return float(1 - np.minimum(ratio, 1 / ratio).mean())


def _small_buckets(pairs: list[tuple[str, int]]) -> list[str]:
    """Return a warning of buckets, given as (name, training images), that have few; none where there is one bucket.

    Empty ones are no trouble: no step is of them.
    """
    small = [f"{name} ({count})" for name, count in pairs if 0 < count < _SMALL]
    if len(pairs) < 2 or not small:
        return []
    kept = [name for name, count in pairs if count >= _SMALL]
    without = f" (--buckets {','.join(kept)})" if len(kept) > 1 else ""
    return [
        f"small buckets, below {_SMALL} pictures to train on: {', '.join(small)}; a run whose train.global_batch is "
        "larger than a bucket takes some of its pictures twice in a step: add pictures of these shapes, or leave the "
        f"buckets out{without}"
    ]
