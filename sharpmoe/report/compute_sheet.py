"""Where compute goes: maps of two or more models beside the images, on one colour scale.

A routing sheet shows one model step by step; this sheet compares models, so it averages over the denoising steps of a
range of t and shows each token's experts relative to an even spread over the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sharpmoe.evaluation.allocation import steps_of_range
from sharpmoe.report.figures import Pixels, drawable, render_figure, to_pixels, write_title
from sharpmoe.report.routing_sheet import RoutingSheet, to_grid, write_caption

COMPUTE_RANGES = ("t > 0.65", "t 0.35-0.65", "t < 0.35", "all t")
COMPUTE_SPREAD = 0.5  # the colour scale ends this far below and above 1: most maps of a converged model lie within
_LETTERS = 130  # points x letters of a title that has room above a map
COMPUTE_HEAT = "RdBu_r"  # blue: fewer experts than an even spread, red: more


def draw_compute_sheet(
    sheets: Mapping[str, RoutingSheet],
    title: str = "",
    images: int | None = None,
    ranges: Sequence[str] = COMPUTE_RANGES,
) -> Pixels:
    """Draw one row per image: image, saliency M, then for every range of t one map per model.

    `sheets`: one per model, of the same images; their order is the order of the maps. A map shows experts per token,
    averaged over the steps of the range and divided by the mean over the image's tokens: 1 is an even spread. All maps
    share one scale. `images`: rows, at most; all of them by default.
    """
    first = next(iter(sheets.values()))
    count = min(images or len(first.captions), len(first.captions))
    columns = 2 + len(ranges) * len(sheets)
    # An empty column before each range keeps its maps together.
    widths = [1.0, 1.0, *([0.14, *[1.0] * len(sheets)] * len(ranges))]
    figure = Figure(figsize=(1.0 * columns + 1.3, 1.16 * count + 0.75 + 0.3 * bool(title)), dpi=110)
    axes = figure.subplots(count, len(widths), squeeze=False, width_ratios=widths)
    for row, pixels in zip(range(count), to_pixels(first.images), strict=False):
        saliency = to_grid(first.saliency[row], first)
        axes[row, 0].imshow(pixels)
        axes[row, 1].imshow(saliency, interpolation="nearest", cmap="gray", vmin=0)
        write_caption(axes[row, 0], first.captions[row])
        for column, (sheet, shown) in _columns(sheets, ranges):
            drawn = axes[row, column].imshow(
                to_grid(relative_experts(sheet, row, shown), sheet),
                interpolation="nearest",
                cmap=COMPUTE_HEAT,
                vmin=1 - COMPUTE_SPREAD,
                vmax=1 + COMPUTE_SPREAD,
            )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    _set_titles(axes, sheets, ranges)
    top = 1 - (0.55 + 0.3 * bool(title)) / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.93, top=top, bottom=0.2 / figure.get_figheight(), wspace=0.05)
    if title:
        write_title(figure, title)
    bar = figure.add_axes((0.942, 0.3, 0.009, 0.4))
    figure.colorbar(drawn, cax=bar, extend="both").set_label("experts per token, 1 = even spread", fontsize=8)
    bar.tick_params(labelsize=7)
    return render_figure(figure)


def _columns(sheets: Mapping[str, RoutingSheet], ranges: Sequence[str]) -> list[tuple[int, tuple[RoutingSheet, str]]]:
    """Return (column, (sheet, range)) of every map."""
    block = len(sheets) + 1
    return [
        (3 + number * block + place, (sheet, shown))
        for number, shown in enumerate(ranges)
        for place, sheet in enumerate(sheets.values())
    ]


def relative_experts(sheet: RoutingSheet, row: int, shown: str) -> Tensor:
    """Return experts per token (N,) of one image in a range of t, relative to their mean."""
    experts = sheet.experts[row, steps_of_range(sheet.times, shown)].float().mean(0)
    return experts / experts.mean().clamp(min=1e-12)


def _set_titles(axes: np.ndarray, sheets: Mapping[str, RoutingSheet], ranges: Sequence[str]) -> None:
    """Name the columns, and above them the range of t that a group of columns shares."""
    block = len(sheets) + 1
    size = min(8.5, _LETTERS / max(map(len, sheets)))
    for axis in axes[:, 2::block].flat:
        axis.axis("off")
    axes[0, 0].set_title("image", fontsize=8.5)
    axes[0, 1].set_title("saliency M", fontsize=8.5)
    for number, shown in enumerate(ranges):
        group = axes[0, 3 + number * block :][: len(sheets)]
        for axis, name in zip(group, sheets, strict=True):
            axis.set_title(drawable(name), fontsize=size, parse_math=False)
        group[0].text(len(sheets) / 2, 1.24, shown, ha="center", fontsize=9.5, transform=group[0].transAxes)
