"""What a codec is: images to latents and back, with an identity that travels with the shards."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from data_pipeline.identity import Identity
from sharpmoe.errors import DataError

ImageSize = int | tuple[int, int]  # pixels of a square, or (H, W)


class CachedLatent(NamedTuple):
    """The latent that another project has cached for one image."""

    image: str  # how messages name the image
    file: str  # "" where the source has no cached latents
    mirrored: bool  # the latent of the mirror image is needed


class Posterior(NamedTuple):
    """Latents of a batch of images."""

    mean: Tensor  # (B, C, h, w) float32, scaled as the model sees it
    std: Tensor | None  # the same, scaled too; None where the codec has one latent per image


class Codec(Protocol):
    """Images to latents of about unit variance, and back. A new one needs a row in `encode.build.CODECS`."""

    @property
    def identity(self) -> Identity:
        """Equal for two codecs if and only if they give the same latents."""
        ...

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (C, h, w) for images of that size. Raises DataError where the size does not divide."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Encode (B, 3, H, W) float32 in [-1, 1] to (B, C, h, w) float32."""
        ...

    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        """Encode images to a mean and, where the codec has one, a standard deviation.

        `cached` holds one entry per image; only a codec that reads cached latents looks at it.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, C, h, w) float32 to (B, 3, H, W) float32, clamped to [-1, 1]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what must be stored with the shards to build the codec again."""
        ...


def frame_by_frame(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply what encodes or decodes images (B, C, H, W) to these, or to every frame of clips (B, C, T, H, W).

    A codec that compresses time as well would take the place of this.
    """
    if images.ndim == 4:
        return function(images)
    found = function(images.transpose(1, 2).flatten(0, 1))
    return found.unflatten(0, (len(images), images.shape[2])).transpose(1, 2)


class Pixel:
    """No codec: the latent is the image itself, in [-1, 1]."""

    identity: Identity = {"kind": "pixel"}  # noqa: RUF012  (never written)

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (3, H, W)."""
        return 3, *_sides(image_size)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        return Posterior(self.encode(images), None)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        return {}


def divided(image_size: ImageSize, factor: int, codec: str) -> tuple[int, int]:
    """Return (H, W) / factor. Raises DataError, which names `codec`, where a side is not a multiple of `factor`."""
    height, width = _sides(image_size)
    if height % factor or width % factor:
        shown = f"{height}" if height == width else f"{height}x{width}"
        raise DataError(f"image size {shown}: codec {codec} needs a multiple of {factor}")
    return height // factor, width // factor


def _sides(image_size: ImageSize) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size
