"""Image files of any kind become square float pictures on white."""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises for files that are damaged, truncated, absurdly large, or no images at all.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Picture(NamedTuple):
    """A decoded image at the trained resolution."""

    pixels: np.ndarray  # (3, S, S) float32 in [-1, 1], composited on white
    alpha: np.ndarray | None  # (1, S, S) float32 in [0, 1]; None where the file has no transparency


def load_picture(source: Path | bytes, size: int) -> Picture:
    """Decode, turn upright, centre-crop to a square, composite on white and resize to `size`.

    Raises one of `UNREADABLE` where the file cannot be decoded. Compositing before resizing weighs colours by alpha,
    so hidden colours of transparent pixels never bleed in. A file that is opaque everywhere has no alpha: its mask
    would say nothing.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        image = ImageOps.exif_transpose(opened)
        image = _square(_to_eight_bit(image))
    if not image.has_transparency_data:
        return Picture(_pixels(image.convert("RGB"), size), None)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    white = Image.new("RGBA", rgba.size, "white")
    pixels = _pixels(Image.alpha_composite(white, rgba).convert("RGB"), size)
    opaque = alpha.getextrema() == (255, 255)
    return Picture(pixels, None if opaque else _levels(alpha, size)[None])


def mirror(picture: Picture) -> Picture:
    """Return the picture with left and right exchanged."""
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


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _levels(image: Image.Image, size: int) -> np.ndarray:
    resized = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float32) / 255


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    return np.ascontiguousarray(_levels(image, size).transpose(2, 0, 1) * 2 - 1)
