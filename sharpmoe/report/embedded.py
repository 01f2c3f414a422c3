"""Pictures inside a page: data URIs of bounded size, and maps of tokens as tiny pictures on one colour scale."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from PIL import Image

from sharpmoe.report.figures import Pixels
from sharpmoe.report.markup import element

PAGE_MIB = 16  # of pictures in one page, at most
_LARGE = 200_000  # bytes of a PNG, above which a picture becomes WebP
_WIDEST, _HIGHEST = 2000, 12_000  # pixels
_QUALITY = 88


class PictureBudget:
    """Embeds the pictures of one page until `PAGE_MIB` is reached; `left_out` names those that had no room."""

    def __init__(self, limit: int = PAGE_MIB * 2**20) -> None:
        """Start with nothing embedded. limit: bytes of all data URIs together."""
        self._room = limit
        self.left_out: list[str] = []

    def file(self, path: Path, title: str) -> Markup:
        """Return the picture of a file with its title; a note where it cannot be read or there is no room for it."""
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                kind, data = ("png", content) if _is_small(image, content) else ("webp", _as_webp(image))
        except (OSError, SyntaxError, ValueError) as error:
            reason = " ".join(str(error).replace(str(path), path.name).split())
            return element("figure", element("figcaption", f"{title}: cannot be read ({reason})"))
        source = _data_uri(kind, data)
        if len(source) > self._room:
            self.left_out.append(title)
            return Markup("")
        self._room -= len(source)
        return element("figure", element("img", src=source, alt=title, loading="lazy"), element("figcaption", title))


def tiny_picture(pixels: Pixels, title: str, pixelated: bool = True) -> Markup:
    """Return a small picture (H, W, 3) uint8 of which every pixel is shown; `title` appears under the pointer."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    kind = "map" if pixelated else "thumb"
    return element("img", src=_data_uri("png", buffer.getvalue()), alt=title, title=title, class_=kind)


def map_pixels(values: np.ndarray, heat: str, low: float, high: float) -> Pixels:
    """Return values (H, W) as pixels of a colour map of matplotlib; values outside get the colours of the ends."""
    shares = np.clip((np.asarray(values, np.float64) - low) / max(high - low, 1e-12), 0, 1)
    colours: np.ndarray = matplotlib.colormaps[heat](shares)
    return np.round(colours[..., :3] * 255).astype(np.uint8)


def colour_bar(heat: str, low: str, high: str, label: str) -> Markup:
    """Return the scale of maps: a bar with the values of its ends, and what they are."""
    stops = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[heat](share / 8)) for share in range(9))
    bar = element("i", style=f"background: linear-gradient(to right, {stops})")
    return element("p", low, bar, high, element("span", label), class_="scale")


def _is_small(image: Image.Image, content: bytes) -> bool:
    return image.format == "PNG" and len(content) <= _LARGE and image.width <= _WIDEST


def _as_webp(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    scale = min(1.0, _WIDEST / image.width, _HIGHEST / image.height)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
