"""What alignment with saliency costs: flow loss and distances of samples against it, one point per arm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharpmoe.evaluation.statistics import Interval, plain_interval
from sharpmoe.report.figures import Pixels, render_figure
from sharpmoe.study.plan import Study
from sharpmoe.study.table import ALIGNMENT, FLOW, FLOW_MARKOV, StudyTable, figure_kind

_DISTANCES = ("fd", "fid", "kid", "cmmd")
_LABELS = {FLOW: "held-out flow loss", FLOW_MARKOV: "held-out flow loss, Markov noise"}
_MARKERS = "osv^<>Phd*pX"
_SIDE = 4.3  # inches of a plane
_LEGEND_COLUMNS = 6


def curve_points(study: Study, table: StudyTable) -> dict[str, Any]:
    """Return what the curves show, as JSON values: for every arm the figures of each plane with their intervals.

    `level` is a mean with Student's interval over seeds (null where one seed cannot tell), `seeds` the mean of each
    seed, `difference` the paired difference to the control with its interval over seeds and images.
    """
    return {
        "alignment": ALIGNMENT,
        "figures": _planes(table),
        "points": {
            arm: {
                name: {
                    "level": plain_interval(table.over_seeds[arm].get(name)),
                    "seeds": {str(seed): value for seed, value in table.by_seed[arm].get(name, {}).items()},
                    "difference": plain_interval(table.differences.get(arm, {}).get(name)),
                }
                for name in (ALIGNMENT, *_planes(table))
            }
            for arm in table.means
        },
        "lines": {arm.name: arm.line for arm in study.arms if arm.line and arm.name in table.means},
    }


def draw_curves(study: Study, table: StudyTable) -> Pixels:
    """Plot every figure against alignment: above, means; below, paired differences to the control.

    Bars above are Student's over seeds, the images being the same, with a small point for each seed; bars below are
    over seeds and images. An arm below the line of 0 is better than the control.
    """
    planes = _planes(table)
    rows = 2 if table.differences else 1
    figure = Figure(figsize=(_SIDE * max(len(planes), 1) + 0.4, 3.7 * rows + 1.1), dpi=110, layout="constrained")
    grid = figure.subplots(rows, max(len(planes), 1), squeeze=False)
    styles = _styles(study)
    for axes, name in zip(grid.T, planes, strict=False):
        _draw_levels(axes[0], study, table, name, styles)
        if rows == 2:
            _draw_differences(axes[1], study, table, name, styles)
        axes[-1].set_xlabel("Spearman of experts per token with M, all t")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        columns = min(len(labels), _LEGEND_COLUMNS)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return render_figure(figure)


def _planes(table: StudyTable) -> list[str]:
    """Return the figures that are drawn against alignment: smaller is better in all."""
    distances = [name for name in table.names if figure_kind(name) in _DISTANCES]
    return [name for name in (FLOW, FLOW_MARKOV) if name in table.names] + distances


def _styles(study: Study) -> dict[str, dict[str, Any]]:
    """Return colour and marker of every arm, the same whatever is measured; the control is a black diamond."""
    pairs = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = cycle([*pairs[::2], *pairs[1::2]])  # ten colours, then their lighter twins
    found = {
        arm.name: {"color": colour, "marker": marker, "markersize": 6}
        for arm, colour, marker in zip(study.arms, colours, cycle(_MARKERS), strict=False)
    }
    return found | {study.control: {"color": "black", "marker": "D", "markersize": 7}}


def _draw_levels(
    axis: Axes, study: Study, table: StudyTable, name: str, styles: Mapping[str, Mapping[str, Any]]
) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in study.arms:
        x, y = (table.over_seeds.get(arm.name, {}).get(key) for key in (ALIGNMENT, name))
        if x is None or y is None or math.isnan(x.mean) or math.isnan(y.mean):
            continue
        label = arm.name + (" (control)" if arm.name == study.control else "")
        axis.errorbar(x.mean, y.mean, xerr=_bars(x), yerr=_bars(y), capsize=2, label=label, **styles[arm.name])
        seeds = table.by_seed[arm.name]
        if len(seeds[name]) > 1:
            pairs = [(seeds[ALIGNMENT][seed], value) for seed, value in seeds[name].items()]
            axis.plot(*zip(*pairs, strict=True), ".", color=styles[arm.name]["color"], alpha=0.45, markersize=4)
        if arm.line:
            lines.setdefault(arm.line, []).append((x.mean, y.mean))
    for points in lines.values():
        axis.plot(*zip(*points, strict=True), color="#999999", linewidth=0.9, zorder=0)
    axis.set(title=_LABELS.get(name, name), ylabel="mean, interval over seeds")
    axis.grid(alpha=0.25)


def _draw_differences(
    axis: Axes, study: Study, table: StudyTable, name: str, styles: Mapping[str, Mapping[str, Any]]
) -> None:
    axis.axhline(0, color="black", linewidth=0.9, zorder=0)
    control = table.over_seeds.get(study.control, {}).get(ALIGNMENT)
    if control is not None and not math.isnan(control.mean):
        axis.plot(control.mean, 0, **styles[study.control])
    for arm, found in table.differences.items():
        x, y = table.over_seeds[arm].get(ALIGNMENT), found.get(name)
        if x is None or y is None or math.isnan(x.mean) or math.isnan(y.mean):
            continue
        axis.errorbar(x.mean, y.mean, yerr=_bars(y), capsize=2, **styles[arm])
    axis.set(ylabel=f"difference to {study.control}, paired")
    axis.grid(alpha=0.25)


def _bars(value: Interval) -> list[list[float]] | None:
    return None if math.isnan(value.low) else [[value.mean - value.low], [value.high - value.mean]]
