"""The shapes of a run's data: whether its model takes them, and how many tokens their images have."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from data_pipeline.index import Bucket
from sharpmoe.config import ModelConfig


class ShapedData(Protocol):
    """What a shard set and a mixture of several say about their samples."""

    buckets: dict[str, Bucket]
    text_width: int
    pooled_width: int


class ShapeMismatch(NamedTuple):
    """A key of the model, and its values."""

    key: str  # of `ModelConfig`
    data: str  # what the data were made for
    model: str


def shape_mismatch(data: ShapedData, model: ModelConfig, *, any_size: bool = False) -> ShapeMismatch | None:
    """Return what of the data the model does not take; None where they fit.

    Buckets may have any number of tokens. For training, their frames are `latent_frames`, and `latent_size` is the
    square on which positions are centred: one of the data's squares or, where they have none, a size between their
    shortest and their longest side. A trained model takes images of `any_size`, and any number of frames where it takes
    frames at all.
    """
    text = [("text_width", data.text_width, model.text_width)]
    if "pooled_width" not in model.architecture.ignores:
        text.append(("pooled_width", data.pooled_width, model.pooled_width))
    checks: list[tuple[str, object, object]] = [
        *(("latent_channels", bucket.latent[0], model.latent_channels) for bucket in data.buckets.values()),
        *(("patch_size", bucket.latent[-1] // bucket.grid[-1], model.patch_size) for bucket in data.buckets.values()),
        *(_frames(bucket, model, any_size) for bucket in data.buckets.values()),
        *(text if model.conditioning == "text" else ()),
    ]
    for key, there, here in checks:
        if there != here:
            return ShapeMismatch(key, str(there), str(here))
    return None if any_size else _size_mismatch(data.buckets, model.latent_size)


def token_counts(buckets: Mapping[str, Bucket]) -> tuple[int, ...]:
    """Return the different numbers of tokens of an image, the fewest first."""
    return tuple(sorted({bucket.tokens for bucket in buckets.values()}))


def _frames(bucket: Bucket, model: ModelConfig, any_size: bool) -> tuple[str, object, object]:
    takes_any = any_size and (model.takes_frames or bucket.frames == 1)
    return "latent_frames", bucket.frames, bucket.frames if takes_any else model.latent_frames


def _size_mismatch(buckets: Mapping[str, Bucket], size: int) -> ShapeMismatch | None:
    sides = [bucket.latent[-2:] for bucket in buckets.values()]
    squares = sorted({height for height, width in sides if height == width})
    if squares:
        there, fits = " or ".join(map(str, squares)), size in squares
    else:
        shortest, longest = min(map(min, sides)), max(map(max, sides))
        there, fits = f"{shortest} to {longest}", shortest <= size <= longest
    return None if fits else ShapeMismatch("latent_size", there, str(size))
