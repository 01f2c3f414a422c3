"""Decode image files of any kind to float arrays of one shape, on white."""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from data_pipeline.safety import LFS_POINTER

# Other formats are never opened: Pillow passes some of them (EPS) to other programs, by the file's content alone.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_PIXELS = 64_000_000  # Pillow itself refuses only three times as many
FITS = ("crop", "pad")
_MAX_PROFILE = 4 << 20  # bytes of a colour profile that is applied
_ORIENTATION = ExifTags.Base.Orientation
# What Pillow raises for files that are damaged, truncated, far too large, or not images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class View(NamedTuple):
    """Which part of an image is seen at the trained resolution, and how large: what maps of it must follow."""

    box: tuple[float, float, float, float]  # left, top, right and bottom of the part, as shares of the upright image
    inner: tuple[int, int]  # pixels (H, W) of the part, centred in `size`
    size: tuple[int, int]  # trained resolution (H, W)


class Picture(NamedTuple):
    """A decoded image at the trained resolution (H, W), or the frames of a clip."""

    pixels: np.ndarray  # (3, H, W) float32 in [-1, 1], composited on white; of a clip (3, T, H, W)
    alpha: np.ndarray | None  # (1, [T,] H, W) float32 in [0, 1]; None where the file has no transparency
    enlarged: bool = False  # the file has fewer pixels than the trained resolution, each way
    view: View | None = None
    saliency: np.ndarray | None = None  # (1, H, W) float32 in [0, 1]; None where the source has no map of the image


def load_picture(source: Path | bytes, size: tuple[int, int], fit: str = "crop") -> Picture:
    """Decode, turn upright, convert to sRGB, fit to the shape of `size` (H, W), composite on white and resize to it.

    `fit`: crop to the largest centred part of that shape, or pad: keep all of the image, with white bars at two sides,
    which are transparent where the image has transparency (so a mask never marks them).

    Raises one of `UNREADABLE` where the file cannot be decoded. Compositing before resizing weighs colours by alpha,
    so the colours of transparent pixels have no effect. A file that is opaque everywhere has no alpha: its mask
    would hold no information.
    """
    with open_image(source) as opened:
        return fit_picture(opened, size, fit)


def fit_picture(opened: Image.Image, size: tuple[int, int], fit: str) -> Picture:
    """Do what `load_picture` does to the present frame of an opened image."""
    whole = _to_eight_bit(ImageOps.exif_transpose(opened))
    box = _crop_box(whole, size) if fit == "crop" else (0, 0, whole.width, whole.height)
    image = _to_srgb(whole.crop(box) if fit == "crop" else whole)
    inner = size if fit == "crop" else _inner(image, size)
    enlarged = image.height < inner[0] or image.width < inner[1]
    shares = box[0] / whole.width, box[1] / whole.height, box[2] / whole.width, box[3] / whole.height
    picture = _on_white(image, inner)._replace(enlarged=enlarged, view=View(shares, inner, size))
    return picture if inner == size else _padded(picture, size)


def load_map(content: bytes, view: View) -> np.ndarray:
    """Decode a grey map of a whole image, of any size, and fit it as the image was: (1, H, W) float32 in [0, 1].

    0 is black and 1 is white, with 8 or 16 bits; colours become grey, transparency is ignored, and bars beside a
    padded image are 0. Raises one of `UNREADABLE` where it cannot be decoded.
    """
    with open_image(content) as opened:
        grey = _grey(ImageOps.exif_transpose(opened))
    left, top, right, bottom = view.box
    box = left * grey.width, top * grey.height, right * grey.width, bottom * grey.height
    height, width = view.inner
    levels = np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR, box), dtype=np.float32)
    return np.pad(levels[None].clip(0, 1), _around(view.inner, view.size))


def _grey(image: Image.Image) -> Image.Image:
    """Convert to one channel of floats in [0, 1]."""
    most = 65535 if image.mode.startswith("I") else 255
    levels = np.asarray(image if most > 255 else _to_eight_bit(image).convert("L"), dtype=np.float32)
    return Image.fromarray(levels / most)


def is_enlarged(pixels: np.ndarray, size: tuple[int, int], fit: str) -> np.ndarray:
    """Return whether images of (n, 2) heights and widths are enlarged to fit `size` (H, W): (n,) bool."""
    smaller = pixels < size
    return np.asarray(smaller.any(1) if fit == "crop" else smaller.all(1))


def _on_white(image: Image.Image, size: tuple[int, int]) -> Picture:
    if not image.has_transparency_data:
        return Picture(_pixels(image.convert("RGB"), size), None)
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    white = Image.new("RGBA", rgba.size, "white")
    pixels = _pixels(Image.alpha_composite(white, rgba).convert("RGB"), size)
    opaque = alpha.getextrema() == (255, 255)
    return Picture(pixels, None if opaque else _levels(alpha, size)[None])


def open_image(source: Path | bytes) -> Image.Image:
    """Read the header of an image, but not its pixels."""
    if isinstance(source, bytes) and source.startswith(LFS_POINTER):
        raise ValueError("a pointer of Git LFS, not the picture itself (git lfs pull)")
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, at most {_MAX_PIXELS} are decoded")
    return image


def mirror(picture: Picture) -> Picture:
    """Return the mirror image, with its maps mirrored."""
    pixels = np.ascontiguousarray(picture.pixels[..., ::-1])
    alpha, saliency = (
        None if one is None else np.ascontiguousarray(one[..., ::-1]) for one in (picture.alpha, picture.saliency)
    )
    return picture._replace(pixels=pixels, alpha=alpha, saliency=saliency)


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
    with open_image(content) as opened:
        sideways = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (opened.width, opened.height) if sideways else (opened.height, opened.width)


_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by the colour space of a profile


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an image with a colour profile to sRGB; a profile that cannot be read is ignored."""
    content = image.info.get("icc_profile")
    if not content or len(content) > _MAX_PROFILE:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        space = profile.profile.xcolor_space.strip()
        srgb = ImageCms.createProfile("sRGB")
        if image.has_transparency_data or image.mode == "P":
            rgba = image.convert("RGBA")
            alpha = rgba.getchannel("A")
            colours = ImageCms.profileToProfile(rgba.convert(_MODES[space]), profile, srgb, outputMode="RGB")
            assert colours is not None
            if image.has_transparency_data:
                colours.putalpha(alpha)
            return colours
        converted = ImageCms.profileToProfile(image.convert(_MODES[space]), profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, KeyError, OSError, TypeError, ValueError):
        return image
    return image if converted is None else converted


def _inner(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size (H, W) within `size` that has the shape of the image."""
    height, width = size
    scale = min(height / image.height, width / image.width)
    return max(1, min(height, round(image.height * scale))), max(1, min(width, round(image.width * scale)))


def _padded(picture: Picture, size: tuple[int, int]) -> Picture:
    """Centre a picture in `size` (H, W): white around it, and transparent."""
    around = _around(picture.pixels.shape[1:], size)
    alpha = None if picture.alpha is None else np.pad(picture.alpha, around)
    return picture._replace(pixels=np.pad(picture.pixels, around, constant_values=1.0), alpha=alpha)


def _around(inner: tuple[int, ...], size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the rows and columns before and after each axis of (C, *inner) that make it (C, *size)."""
    height, width = inner
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return (0, 0), (top, size[0] - height - top), (left, size[1] - width - left)


def _crop_box(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest centred part with the shape of `size` (H, W)."""
    height, width = size
    across = min(image.width, round(image.height * width / height))
    down = min(image.height, round(image.width * height / width))
    across, down = max(1, across), max(1, down)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return left, top, left + across, top + down


def _levels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float32) / 255


def _pixels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.ascontiguousarray(_levels(image, size).transpose(2, 0, 1) * 2 - 1)
