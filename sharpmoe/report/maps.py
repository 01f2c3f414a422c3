"""Where compute goes before and after a run, or in several runs: maps of the same images on one colour scale."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from sharpmoe.report.compute_sheet import COMPUTE_HEAT, COMPUTE_RANGES, COMPUTE_SPREAD, relative_experts
from sharpmoe.report.embedded import colour_bar, map_pixels, tiny_picture
from sharpmoe.report.figures import drawable, to_pixels
from sharpmoe.report.markup import element
from sharpmoe.report.routing_sheet import RoutingSheet, to_grid

_IMAGES = 8  # rows, at most


def compute_maps(sheets: Mapping[str, RoutingSheet]) -> Markup:
    """Return a row per image: image, saliency M, and for every range of t the maps of all sheets beside each other.

    A map shows experts per token over their mean in the image; all maps share one scale. Sheets of other images than
    those of the first are left out.
    """
    kept = _of_same_images(sheets)
    if not kept:
        return Markup("")
    first = next(iter(kept.values()))
    rows = [_row(kept, row) for row in range(min(_IMAGES, len(first.captions)))]
    bar = colour_bar(
        COMPUTE_HEAT, f"{1 - COMPUTE_SPREAD:g} ", f" {1 + COMPUTE_SPREAD:g}", "experts per token, 1 = even spread"
    )
    return element("div", bar, *rows, class_="maps")


def _of_same_images(sheets: Mapping[str, RoutingSheet]) -> dict[str, RoutingSheet]:
    captions = [sheet.captions for sheet in sheets.values()]
    return {name: sheet for name, sheet in sheets.items() if sheet.captions == captions[0]}


def _row(sheets: Mapping[str, RoutingSheet], row: int) -> Markup:
    first = next(iter(sheets.values()))
    caption = drawable(first.captions[row])
    saliency = to_grid(first.saliency[row], first)
    heads = [
        _cell(tiny_picture(to_pixels(first.images[row : row + 1])[0], caption, pixelated=False), "image"),
        _cell(tiny_picture(map_pixels(saliency, "gray", 0, float(saliency.max())), f"M of {caption}"), "saliency M"),
    ]
    groups = [
        element(
            "div",
            element("b", shown),
            element("div", *(_map(name, sheet, row, shown) for name, sheet in sheets.items()), class_="pair"),
            class_="group",
        )
        for shown in COMPUTE_RANGES
    ]
    pair = element("div", element("b", caption), element("div", *heads, class_="pair"), class_="group")
    return element("div", pair, *groups, class_="maprow")


def _map(name: str, sheet: RoutingSheet, row: int, shown: str) -> Markup:
    values = to_grid(relative_experts(sheet, row, shown), sheet)
    pixels = map_pixels(values, COMPUTE_HEAT, 1 - COMPUTE_SPREAD, 1 + COMPUTE_SPREAD)
    told = f"{name}, {shown}: {values.min():.2f} to {values.max():.2f} of an even spread"
    return _cell(tiny_picture(pixels, told), name)


def _cell(picture: Markup, label: str) -> Markup:
    return element("figure", picture, element("figcaption", label))
