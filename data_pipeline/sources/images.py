"""Decode image files of any kind to float arrays of one shape, on white."""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Other formats are never opened: Pillow passes some of them (EPS) to other programs, by the file's content alone.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_PIXELS = 64_000_000  # Pillow itself refuses only three times as many
_ORIENTATION = ExifTags.Base.Orientation
# What Pillow raises for files that are damaged, truncated, far too large, or not images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Picture(NamedTuple):
    """A decoded image at the trained resolution (H, W)."""

    pixels: np.ndarray  # (3, H, W) float32 in [-1, 1], composited on white
    alpha: np.ndarray | None  # (1, H, W) float32 in [0, 1]; None where the file has no transparency


def load_picture(source: Path | bytes, size: tuple[int, int]) -> Picture:
    """Decode, turn upright, centre-crop to the shape of `size` (H, W), composite on white and resize to it.

    Raises one of `UNREADABLE` where the file cannot be decoded. Compositing before resizing weighs colours by alpha,
    so the colours of transparent pixels have no effect. A file that is opaque everywhere has no alpha: its mask
    would hold no information.
    """
    with _open(source) as opened:
        image = ImageOps.exif_transpose(opened)
        image = _cropped(_to_eight_bit(image), size)
    if not image.has_transparency_data:
        return Picture(_pixels(image.convert("RGB"), size), None)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    white = Image.new("RGBA", rgba.size, "white")
    pixels = _pixels(Image.alpha_composite(white, rgba).convert("RGB"), size)
    opaque = alpha.getextrema() == (255, 255)
    return Picture(pixels, None if opaque else _levels(alpha, size)[None])


def _open(source: Path | bytes) -> Image.Image:
    """Read the header of an image, but not its pixels."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {_MAX_PIXELS} are decoded")
    return image


def mirror(picture: Picture) -> Picture:
    """Return the mirror image."""
    pixels = np.ascontiguousarray(picture.pixels[..., ::-1])
    return Picture(pixels, None if picture.alpha is None else np.ascontiguousarray(picture.alpha[..., ::-1]))


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit greys down: Pillow's own conversion clips everything above 255 to white."""
    if image.mode.startswith("I"):
        levels = np.asarray(image, dtype=np.float64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("integer grey levels outside 0..65535")
        return Image.fromarray(np.round(levels / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("float images have no stated range; save them with 8 or 16 bits")
    return image


def upright_size(content: bytes) -> tuple[int, int]:
    """Return (H, W) of an image file as `load_picture` sees it, from its header; the start of the file mostly suffices.

    Raises one of `UNREADABLE` where the header cannot be read.
    """
    with _open(content) as opened:
        sideways = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if sideways else (opened.height, opened.width)


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop to the largest centred part with the shape of `size` (H, W)."""
    height, width = size
    across = min(image.width, round(image.height * width / height))
    down = min(image.height, round(image.width * height / width))
    across, down = max(1, across), max(1, down)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down))


def _levels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float32) / 255


def _pixels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.ascontiguousarray(_levels(image, size).transpose(2, 0, 1) * 2 - 1)
