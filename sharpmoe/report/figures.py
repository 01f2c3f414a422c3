"""Pictures of a run: sample grids, routing sheets, curves. Every function returns pixels (H, W, 3) uint8.

The same pictures go to PNG files, TensorBoard and the HTML page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from sharpmoe.evaluation.allocation import Allocation, Estimate

Pixels = np.ndarray  # (H, W, 3) uint8

CELL = 144  # pixels of one picture in a sample grid
GAP = 10
FONT_SIZE = 13
CAPTION_LINES = 3  # at most
HEAT = "magma"  # dark: no experts


class Sheet(NamedTuple):
    """What a routing sheet shows: I images, T denoising steps, N tokens."""

    images: Tensor  # (I, 3, H, W) in [-1, 1]
    saliency: Tensor  # (I, N)
    foreground: Tensor  # (I, N), NaN where the image has no mask
    experts: Tensor  # (I, T, N) experts that took each token, summed over MoE layers
    times: tuple[float, ...]  # (T), descending
    captions: tuple[str, ...]  # (I)


def to_pixels(images: Tensor) -> list[Pixels]:
    """Turn images (B, 3, H, W) in [-1, 1] into arrays (H, W, 3) uint8; values outside are clipped."""
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return list(levels.permute(0, 2, 3, 1).byte().numpy())


def save(pixels: Pixels, path: Path | str) -> Path:
    """Write a picture as PNG, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sample_grid(images: Tensor, captions: Sequence[str], columns: int | None = None) -> Pixels:
    """Lay out images (B, 3, H, W) in [-1, 1] on white, each over its caption of at most three lines."""
    columns = columns or min(len(captions), max(4, math.ceil(math.sqrt(len(captions) * 1.6))))
    rows = math.ceil(len(captions) / columns)
    font = load_font(FONT_SIZE)
    broken = [wrap(caption or "(empty caption)", CELL, font) for caption in captions]
    cell_height = CELL + max(map(len, broken)) * (FONT_SIZE + 4) + 4
    size = (columns * (CELL + GAP) + GAP, rows * (cell_height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, lines) in enumerate(zip(to_pixels(images), broken, strict=True)):
        left, top = GAP + i % columns * (CELL + GAP), GAP + i // columns * (cell_height + GAP)
        picture = ImageOps.contain(Image.fromarray(pixels), (CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        pen.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="#dddddd")
        for line, text in enumerate(lines):
            y = top + CELL + 5 + line * (FONT_SIZE + 4)
            pen.text((left + CELL / 2, y), text, fill="#222222", font=font, anchor="ma")
    return np.asarray(sheet)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont, lines: int = CAPTION_LINES) -> list[str]:
    """Break text into at most `lines` lines of `width` pixels, between words where possible; `…` is the rest."""
    broken: list[str] = []
    rest = text.strip()
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


def routing_sheet(sheet: Sheet, title: str = "", most: float | None = None) -> Pixels:
    """Draw one row per image: image, M, foreground mask, then experts per token of every denoising step.

    All steps share one colour scale from 0 to `most` (default: the largest count), so rows and steps can be compared.
    M is drawn up to the largest value of its image.
    """
    num_images, num_steps, num_tokens = sheet.experts.shape
    height, width = sheet.images.shape[2:]
    rows = round(math.sqrt(num_tokens * height / width))  # tokens are square in the picture, whatever its aspect
    most = most or max(float(sheet.experts.max()), 1.0)
    columns = 3 + num_steps
    figure = Figure(figsize=(1.02 * columns + 0.9, 1.2 * num_images + 0.55 + 0.3 * bool(title)), dpi=110)
    axes = figure.subplots(num_images, columns, squeeze=False)
    heads = ["image", "saliency M", "mask", *(f"t = {t:.3g}" for t in sheet.times)]
    for row, pixels in zip(range(num_images), to_pixels(sheet.images), strict=True):
        maps = [sheet.saliency[row], sheet.foreground[row], *sheet.experts[row]]
        grids = [values.reshape(rows, -1).float().cpu().numpy() for values in maps]
        axes[row, 0].imshow(pixels)
        for column, grid in enumerate(grids, start=1):
            top = (float(grid.max()), 1.0, most)[min(column - 1, 2)]
            heat = HEAT if column > 2 else "gray"
            drawn = axes[row, column].imshow(grid, interpolation="nearest", cmap=heat, vmin=0, vmax=top)
        if np.isnan(grids[1]).any():
            axes[row, 2].text(0.5, 0.5, "none", ha="center", va="center", transform=axes[row, 2].transAxes, fontsize=8)
        axes[row, 0].set_xlabel(_short(sheet.captions[row], 48), fontsize=7.5, labelpad=3, loc="left")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=8.5)
    figure.subplots_adjust(
        left=0.01, right=0.93, top=_top(figure, title), bottom=0.2 / figure.get_figheight(), wspace=0.06
    )
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.1 / figure.get_figheight(), va="top")
    bar = figure.add_axes((0.942, 0.3, 0.009, 0.4))
    figure.colorbar(drawn, cax=bar).set_label("experts per token, all MoE layers", fontsize=8)
    bar.tick_params(labelsize=7)
    return _render(figure)


def allocation_curves(results: Mapping[str, Allocation]) -> Pixels:
    """Compare allocations, such as before and after: Spearman with M by t, and experts per token by saliency."""
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    by_time, by_fifth = figure.subplots(1, 2)
    for name, result in results.items():
        _error_line(by_time, list(result.times), list(result.saliency_by_time.values()), name)
        fifths = result.experts_by_saliency["all t"]
        _error_line(by_fifth, list(range(1, len(fifths) + 1)), list(fifths), name)
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
    return _render(figure)


def curves(lines: Mapping[str, Mapping[int, float]], title: str, logarithmic: bool = False) -> Pixels:
    """Plot named curves {name: {step: value}} over the optimizer steps."""
    figure = Figure(figsize=(5.2, 3.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        marker = "o" if len(points) == 1 else None
        axis.plot(list(points), list(points.values()), label=name, linewidth=1.2, marker=marker)
    axis.set(title=title, xlabel="optimizer step")
    if logarithmic:
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    if len(lines) > 1:
        axis.legend(fontsize=7, frameon=False, ncols=1 + len(lines) // 9)
    return _render(figure)


def _error_line(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], name: str) -> None:
    errors = [0.0 if math.isnan(e.error) else e.error for e in estimates]
    axis.errorbar(x, [e.mean for e in estimates], yerr=errors, label=name, marker="o", markersize=4, capsize=2)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _top(figure: Figure, title: str) -> float:
    return 1 - (0.3 + 0.3 * bool(title)) / figure.get_figheight()


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: there on every machine, and it has accents that Pillow's default lacks."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _render(figure: Figure) -> Pixels:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
