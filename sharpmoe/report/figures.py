"""Pictures of a run: sample grids and curves. Drawing functions return pixels (H, W, 3) uint8.

The same pictures go to PNG files, TensorBoard and the HTML page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from sharpmoe.durable import write_atomically
from sharpmoe.evaluation.allocation import Allocation, ImageMean

Pixels = np.ndarray  # (H, W, 3) uint8

CELL = 144  # pixels of one image in a sample grid, each way
GAP = 10  # pixels between pictures
_FONT_SIZE = 13
_INTERVAL = 1.96  # standard errors
_LEGEND_COLUMNS = 4
# Ten colours, which then come again with another kind of line.
_LINES = cycler(linestyle=["-", "--", ":", "-."]) * matplotlib.rcParams["axes.prop_cycle"]
_CAPTION_LINES = 3  # at most
_MOST_FRAMES = 16  # of a clip in a grid


def to_pixels(images: Tensor) -> list[Pixels]:
    """Convert images (B, 3, H, W) in [-1, 1] to arrays (H, W, 3) uint8; clip values outside."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return list(levels.permute(0, 2, 3, 1).byte().numpy())


def save_png(pixels: Pixels, path: Path | str) -> Path:
    """Write a picture as PNG, complete or not at all, creating its folder; return the path. Raises OSError."""
    path = Path(path)
    write_atomically(path, lambda draft: Image.fromarray(pixels).save(draft, format="PNG"))
    return path


def save_animation(frames: Sequence[Pixels], path: Path | str, milliseconds: int) -> Path:
    """Write frames as an endless animated WebP without loss, complete or not at all; return the path. Raises OSError.

    Equal frames that follow each other become one that lasts as long.
    """
    first, *rest = (Image.fromarray(pixels) for pixels in frames)
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0, "lossless": True}
    path = Path(path)
    write_atomically(path, lambda draft: first.save(draft, format="WEBP", **options))
    return path


def clip_pixels(clips: Tensor) -> list[list[Pixels]]:
    """Convert clips (B, 3, T, H, W) in [-1, 1] to their frames, as `to_pixels`."""
    return [to_pixels(clip.transpose(0, 1)) for clip in clips]


def to_pictures(images: Tensor) -> list[Any]:
    """Convert images (B, 3, H, W) in [-1, 1] to PIL images, clips (B, 3, T, H, W) to lists of their frames."""
    if images.ndim == 5:
        return [[Image.fromarray(pixels) for pixels in frames] for frames in clip_pixels(images)]
    return [Image.fromarray(pixels) for pixels in to_pixels(images)]


def sample_grid(images: Tensor, captions: Sequence[str], columns: int | None = None) -> Pixels:
    """Draw images (B, 3, H, W) in [-1, 1] in a grid on white, each above its caption of at most three lines.

    Of clips (B, 3, T, H, W) every row is one, with its frames beside each other, at most 16 of them, evenly spread.
    """
    if images.ndim == 5:
        return _clip_grid(clip_pixels(images), captions)
    columns = columns or min(len(captions), max(4, math.ceil(math.sqrt(len(captions) * 1.6))))
    rows = math.ceil(len(captions) / columns)
    font = load_font(_FONT_SIZE)
    broken = [wrap(caption, CELL, font) or ["(empty caption)"] for caption in captions]
    cell_height = CELL + max(map(len, broken)) * (_FONT_SIZE + 4) + 4
    size = (columns * (CELL + GAP) + GAP, rows * (cell_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, lines) in enumerate(zip(to_pixels(images), broken, strict=True)):
        left, top = GAP + i % columns * (CELL + GAP), GAP + i // columns * (cell_height + GAP)
        picture = ImageOps.contain(Image.fromarray(pixels), (CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        pen.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="#dddddd")
        for line, text in enumerate(lines):
            y = top + CELL + 5 + line * (_FONT_SIZE + 4)
            pen.text((left + CELL / 2, y), text, fill="#222222", font=font, anchor="ma")
    return np.asarray(sheet)


def _clip_grid(clips: Sequence[Sequence[Pixels]], captions: Sequence[str]) -> Pixels:
    count = min(len(clips[0]), _MOST_FRAMES)
    shown = [at * len(clips[0]) // count for at in range(count)]
    font, side = load_font(_FONT_SIZE), CELL * 2 // 3
    row_height = side + _FONT_SIZE + 8
    size = (max(count, 4) * (side + GAP // 2) + GAP * 3 // 2, len(clips) * (row_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (frames, caption) in enumerate(zip(clips, captions, strict=True)):
        top = GAP + row * (row_height + GAP)
        for column, at in enumerate(shown):
            left = GAP + column * (side + GAP // 2)
            picture = ImageOps.contain(Image.fromarray(frames[at]), (side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
            pen.rectangle((left - 1, top - 1, left + side, top + side), outline="#dddddd")
        (line,) = wrap(caption, size[0] - 2 * GAP, font, 1) or ["(empty caption)"]
        pen.text((GAP, top + side + 5), line, fill="#222222", font=font)
    return np.asarray(sheet)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont, lines: int = _CAPTION_LINES) -> list[str]:
    """Break text into at most `lines` lines of `width` pixels, between words where possible; `…` replaces the rest.

    Line breaks become spaces, and characters that no font can draw are left out.
    """
    broken: list[str] = []
    rest = drawable(text)
    while rest and len(broken) < lines:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            space = rest.rfind(" ", 0, end)
            end = space if space > 0 else end - 1
        broken.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = broken[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        broken[-1] = last.rstrip() + "…"
    return broken


def drawable(text: str) -> str:
    """Return text on one line, without the characters (of control, lone surrogates) that Pillow refuses to draw."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "" for c in text).split())


def allocation_curves(results: Mapping[str, Allocation]) -> Pixels:
    """Plot allocations to compare: Spearman's correlation with M by t, and experts per token by saliency.

    Bands are 95 % intervals of the means: 1.96 standard errors over images either way, of each model by itself.
    """
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    by_time, by_fifth = figure.subplots(1, 2)
    by_time.set_prop_cycle(_LINES)
    by_fifth.set_prop_cycle(_LINES)
    for name, result in ((drawable(name).replace("$", r"\$"), result) for name, result in results.items()):
        _banded_line(by_time, list(result.times), list(result.saliency_by_time.values()), name)
        fifths = result.experts_by_saliency["all t"]
        _banded_line(by_fifth, list(range(1, len(fifths) + 1)), list(fifths), name)
    by_time.invert_xaxis()
    by_time.axhline(0, color="#999999", linewidth=0.8)
    by_time.set(
        xlabel="t (noise → data)", ylabel="Spearman with saliency M", title="rank correlation of experts per token"
    )
    by_fifth.set(xlabel="fifth of the tokens, least to most salient", ylabel="experts per token and layer")
    by_fifth.set(title="where the compute goes", xticks=range(1, 6))
    for axis in (by_time, by_fifth):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.supxlabel("bands: 95 % intervals, 1.96 standard errors over images", fontsize=7.5, color="#555555")
    return render_figure(figure)


def step_curves(
    lines: Mapping[str, Mapping[int, float]], title: str, logarithmic: bool = False, unit: str = ""
) -> Pixels:
    """Plot named curves {name: {step: value}} over the optimizer steps; the legend is below, where no curve is."""
    figure = Figure(figsize=(5.2, 3.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.set_prop_cycle(_LINES)
    for name, points in lines.items():
        marker = "o" if len(points) == 1 else None
        axis.plot(list(points), list(points.values()), label=name, linewidth=1.2, marker=marker)
    axis.set(title=title, xlabel="optimizer step", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if logarithmic:
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        figure.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=min(len(lines), _LEGEND_COLUMNS))
    return render_figure(figure)


def _banded_line(axis: Axes, x: Sequence[float], estimates: Sequence[ImageMean], name: str) -> None:
    """Plot means over images with the band of their 95 % interval."""
    means = np.array([each.mean for each in estimates])
    errors = _INTERVAL * np.array([0.0 if math.isnan(each.error) else each.error for each in estimates])
    (line,) = axis.plot(x, means, label=name, marker="o", markersize=3.5, linewidth=1.4)
    axis.fill_between(x, means - errors, means + errors, color=line.get_color(), alpha=0.18, linewidth=0)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib ships: present on every machine, with the accents that Pillow's default lacks."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def write_title(figure: Figure, text: str) -> None:
    """Write the title of a sheet at its top, as it is: no mathematics."""
    figure.suptitle(drawable(text), parse_math=False, fontsize=10, y=1 - 0.1 / figure.get_figheight(), va="top")


def render_figure(figure: Figure) -> Pixels:
    """Draw a matplotlib figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
