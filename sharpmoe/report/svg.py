"""Line charts as inline SVG: crisp at any size, small, readable on light and dark pages, without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from sharpmoe.report.markup import element

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 34  # margins of the plane
_NUM_COLOURS = 8  # classes c0 to c7 of `CHART_STYLE`
_DASHES = ("", " dashed", " dotted")  # classes after which the colours come again
_MARKED = 24  # points of a curve, up to which each has a mark with its value

CHART_STYLE = """
.chart svg { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif }
.chart text { fill: var(--dim) } .chart .grid { stroke: var(--rule) } .chart polyline { fill: none; stroke-width: 1.6 }
.chart .error { stroke-width: 1.2 } .chart .dashed { stroke-dasharray: 5 3 }
.chart .dotted { stroke-dasharray: 1.5 3 } .chart.words p { margin: 4px 8px; font-size: 13px }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; color: var(--dim); padding-left: 8px }
.legend span { overflow-wrap: anywhere }
.legend i { display: inline-block; width: 16px; border-width: 3px 0 0; border-style: solid; margin-right: 5px;
  vertical-align: middle }
.legend i.dashed { border-style: dashed } .legend i.dotted { border-style: dotted }
"""
_LIGHT = ("#1f6fb4", "#d1630b", "#2a8a3a", "#b3262d", "#7a52a8", "#7b5040", "#c2478f", "#5f6770")
_DARK = ("#6cb2ee", "#ff9d4d", "#6fce7c", "#ff7b7f", "#bda0ea", "#c9a08e", "#f08cc9", "#a9b2bd")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a chart; values that are no numbers interrupt nothing and are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None  # half lengths of bars


def chart_colours(dark: bool) -> str:
    """Return the rules of the colours of curves for light or dark pages."""
    colours = _DARK if dark else _LIGHT
    return "\n".join(
        f".c{i} {{ stroke: {colour}; border-color: {colour} }} circle.c{i} {{ fill: {colour} }}"
        for i, colour in enumerate(colours)
    )


def line_chart(
    curves: Sequence[Curve], title: str, unit: str = "", x_title: str = "optimizer step", descending: bool = False
) -> Markup:
    """Return a figure with a title, a chart and a legend below; nothing where no curve has a point.

    Where none has two points there is nothing to draw: the figure says the values in words.
    descending: the axis runs from the largest x at the left to the smallest.
    """
    kept = [curve for curve in map(_finite, curves) if curve.x]
    if not kept:
        return Markup("")
    caption = element("figcaption", title, element("small", f" {unit}") if unit else "")
    if all(len(curve.x) == 1 for curve in kept):
        return element("figure", caption, *_in_words(kept, x_title), class_="chart words")
    plane = _Plane.around(kept, descending)
    drawn = [part for number, curve in enumerate(kept) for part in _draw(plane, curve, number)]
    label = element("text", x_title, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 3, text_anchor="middle")
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    svg = element("svg", *_axes(plane), *drawn, label, viewBox=box, role="img", aria_label=title)
    return element("figure", caption, svg, _legend(kept), class_="chart")


def _in_words(curves: Sequence[Curve], x_title: str) -> Iterator[Markup]:
    """Return a paragraph for each curve of one point."""
    for curve in curves:
        bar = f" ± {curve.errors[0]:.2g}" if curve.errors and curve.errors[0] else ""
        yield element("p", f"{curve.name}: {curve.y[0]:.4g}{bar} ({x_title} {curve.x[0]:.6g})")


@dataclass(frozen=True, kw_only=True)
class _Plane:
    """Where values lie in the picture."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    descending: bool

    @classmethod
    def around(cls, curves: Sequence[Curve], descending: bool) -> _Plane:
        """Return a plane that holds all points and error bars, with round ticks."""
        xs = [x for curve in curves for x in curve.x]
        ends = [
            value
            for curve in curves
            for y, error in zip(curve.y, curve.errors or [0.0] * len(curve.y), strict=True)
            for value in (y - error, y + error)
        ]
        whole = all(float(x).is_integer() for x in xs)
        x_range, y_range = _widened(min(xs), max(xs)), _widened(min(ends), max(ends))
        y_ticks = MaxNLocator(5).tick_values(*y_range)
        x_ticks = MaxNLocator(5, integer=whole).tick_values(*x_range)
        return cls(
            x_ticks=[float(tick) for tick in x_ticks if x_range[0] <= tick <= x_range[1]],
            y_ticks=[float(tick) for tick in y_ticks],
            x_range=x_range,
            y_range=(float(y_ticks[0]), float(y_ticks[-1])),
            descending=descending,
        )

    def x(self, value: float) -> float:
        share = (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        share = 1 - share if self.descending else share
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _finite(curve: Curve) -> Curve:
    errors = curve.errors or [0.0] * len(curve.y)
    rows = [row for row in zip(curve.x, curve.y, errors, strict=True) if all(map(math.isfinite, row[:2]))]
    x, y, bars = ([row[column] for row in rows] for column in range(3))
    kept = None if curve.errors is None else [bar if math.isfinite(bar) else 0.0 for bar in bars]
    return Curve(name=curve.name, x=x, y=y, errors=kept)


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return a range of some width: about a single value, where all are equal."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = 0.5 * abs(low) or 0.5
    return low - half, high + half


def _axes(plane: _Plane) -> Iterator[Markup]:
    for tick in plane.y_ticks:
        y = plane.y(tick)
        yield element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")
        yield element("text", f"{_rounded(tick, plane.y_ticks):.4g}", x=_LEFT - 6, y=y + 4, text_anchor="end")
    for tick in plane.x_ticks:
        yield element("text", f"{tick:.6g}", x=plane.x(tick), y=_HEIGHT - _BOTTOM + 14, text_anchor="middle")


def _rounded(tick: float, ticks: Sequence[float]) -> float:
    """Return 0 for a tick that is 0 but for rounding."""
    return 0.0 if abs(tick) < 1e-9 * max(map(abs, ticks)) else tick


def _draw(plane: _Plane, curve: Curve, number: int) -> Iterator[Markup]:
    colour = _colour(number)
    points = " ".join(f"{plane.x(x)},{plane.y(y)}" for x, y in zip(curve.x, curve.y, strict=True))
    last = f"{curve.name}: {curve.y[0]:.4g} to {curve.y[-1]:.4g}"
    yield element("polyline", element("title", last), points=points, class_=colour)
    for x, y, error in zip(curve.x, curve.y, curve.errors or (), strict=False):
        at = plane.x(x)
        yield element("line", x1=at, x2=at, y1=plane.y(y - error), y2=plane.y(y + error), class_=f"error {colour}")
    if len(curve.x) <= _MARKED:
        for x, y in zip(curve.x, curve.y, strict=True):
            told = element("title", f"{curve.name}, {x:.6g}: {y:.4g}")
            yield element("circle", told, cx=plane.x(x), cy=plane.y(y), r=2.6, class_=colour)


def _colour(number: int) -> str:
    return f"c{number % _NUM_COLOURS}{_DASHES[number // _NUM_COLOURS % len(_DASHES)]}"


def _legend(curves: Sequence[Curve]) -> Markup:
    if len(curves) < 2:
        return Markup("")
    keys = [element("span", element("i", class_=_colour(n)), curve.name) for n, curve in enumerate(curves)]
    return element("div", *keys, class_="legend")


def named_curves(lines: Mapping[str, Mapping[str, Any]]) -> list[Curve]:
    """Return curves of a report's document: {name: {"steps": ..., "values": ...}}, "errors" where they have bars."""
    return [
        Curve(name=name, x=line["steps"], y=line["values"], errors=_half_bars(line.get("errors")))
        for name, line in lines.items()
    ]


def _half_bars(errors: Sequence[float | None] | None) -> list[float] | None:
    return None if errors is None else [error or 0.0 for error in errors]
