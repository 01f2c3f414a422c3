"""The charts of a report, made of its document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sharpmoe.flow import TIME_RANGES
from sharpmoe.report.markup import element
from sharpmoe.report.run_table import TITLES, fifth_names
from sharpmoe.report.svg import Curve, line_chart, named_curves

_Json = dict[str, Any]

_MIXED = ("optim", "throughput", "memory", "metrics")  # groups of tags whose figures have several units: a chart each
_UNITS = {
    "optim/lr": "learning rate",
    "optim/grad_norm": "before clipping",
    "throughput/images_per_second": "images/s",
    "throughput/tokens_per_second": "tokens/s",
    "throughput/seconds_per_step": "s",
    "throughput/data_wait_share": "share of the step",
    "throughput/tflops_per_rank": "TFLOP/s",
    "throughput/mfu": "share of the peak rate",
    "throughput/hfu": "share of the peak rate",
    "memory/peak_mib": "MiB",
    "metrics/fd": "Frechet distance of samples to held-out images",
    "metrics/fid": "Frechet distance of samples to held-out images",
    "metrics/kid": "kernel distance of samples to held-out images",
    "metrics/accuracy": "share of the samples that have their class",
    "validation": "flow loss",
    "validation_live": "flow loss of live weights",
}
_AT_TIME = re.compile(r"^(.+)_t([0-9.]+)$")  # of the log: flow_t0.875
_HEALTH = {  # group of a figure by layer -> title; drawn as least, mean and largest over MoE layers
    "routing_load_max": "load of the most loaded expert, over the mean",
    "routing_load_min": "load of the least loaded expert, over the mean",
    "routing_dead_experts": "experts without a token",
    "routing_entropy": "entropy of the scores, over its maximum",
    "routing_flipped": "share of choices that the saliency router changes",
}
_STRENGTH = {  # by range of t, mean over MoE layers
    "spread": "saliency router: spread of logits, over the gate's",
    "flipped": "saliency router: share of choices changed",
    "agreement": "correlation of experts per token with M, in training",
}
_OF_TRAINING = "where thresholds choose in inference (DiffMoE, Expert Race), allocations may have the opposite sign"
_OVERLAID = (
    "loss/total",
    "loss/flow",
    "loss/routing",
    "validation/flow",
    "metrics/fd",
    "metrics/fid",
    "metrics/kid",
    "metrics/accuracy",
    "optim/grad_norm",
    "optim/lr",
    "throughput/images_per_second",
    "throughput/data_wait_share",
    "memory/peak_mib",
    *(f"{group}/mean" for group in _HEALTH),
    *(f"saliency_{what}_{name.replace(' ', '')}/mean" for what in _STRENGTH for name in TIME_RANGES),
)


def curve_charts(run: _Json, groups: Sequence[str]) -> Markup:
    """Return one chart per group of tags (the part before the slash) of one unit."""
    found: dict[str, dict[str, _Json]] = {}
    for tag, curve in run["curves"].items():
        group, _, name = tag.partition("/")
        if group in groups and (any(curve["values"]) or group != "loss"):  # losses that a run does not use are always 0
            line = _AT_TIME.sub(r"\1, t = \2", name or tag)
            found.setdefault(tag if group in _MIXED else group, {})[line] = curve
    order = sorted(found, key=lambda title: groups.index(title.partition("/")[0]))
    return _grid([line_chart(named_curves(found[title]), title, _UNITS.get(title, "")) for title in order])


def health_charts(run: _Json) -> Markup:
    """Return charts of load, dead experts and entropy over MoE layers, and of the saliency routers by range of t."""
    curves, charts = run["curves"], []
    for group, title in _HEALTH.items():
        ways = ("least", "mean", "largest")
        lines = {f"{way} of the layers": curves[f"{group}/{way}"] for way in ways if f"{group}/{way}" in curves}
        charts.append(line_chart(named_curves(lines), title))
    for what, title in _STRENGTH.items():
        tags = {name: f"saliency_{what}_{name.replace(' ', '')}/mean" for name in TIME_RANGES}
        lines = {name: curves[tag] for name, tag in tags.items() if tag in curves}
        charts.append(line_chart(named_curves(lines), title, _OF_TRAINING if what == "agreement" else ""))
    return _grid(charts)


def overlaid_charts(runs: Sequence[_Json]) -> Markup:
    """Return one chart per figure with a curve of every run that has it."""
    charts = []
    for tag in _OVERLAID:
        lines = {run["name"]: run["curves"][tag] for run in runs if tag in run["curves"]}
        if any(any(line["values"]) for line in lines.values()):
            group = tag.removesuffix("/mean")
            title = f"{_HEALTH[group]}, mean over layers" if group in _HEALTH else tag
            charts.append(line_chart(named_curves(lines), title, _UNITS.get(tag, "")))
    return _grid(charts)


def allocation_charts(results: Mapping[str, _Json]) -> Markup:
    """Return allocations to compare: correlation with M by time, experts by saliency, flow loss by range of t."""
    by_time, by_fifth, by_range = [], [], []
    for name, result in results.items():
        known = [(t, mean) for t, mean in result["saliency_by_time"] if mean is not None]
        by_time.append(_bars(name, [t for t, _ in known], [mean for _, mean in known]))
        fifths = [(n, mean) for n, mean in enumerate(result["experts_by_saliency"], 1) if mean is not None]
        by_fifth.append(_bars(name, [n for n, _ in fifths], [mean for _, mean in fifths]))
        flows = [(n, result["flow"].get(r)) for n, r in enumerate(TIME_RANGES, 1)]
        by_range.append(_bars(name, [n for n, m in flows if m], [m for _, m in flows if m]))
    fifth = f"fifth of the tokens: 1 {fifth_names()[0]}, 5 {fifth_names()[-1]}"
    ranges = ", ".join(f"{n}: {name}" for n, name in enumerate(TIME_RANGES, 1))
    return _grid(
        [
            line_chart(by_time, TITLES["saliency"], x_title="t (noise to data)", descending=True),
            line_chart(by_fifth, "experts per token by saliency", x_title=fifth),
            line_chart(by_range, "held-out flow loss by time", x_title=ranges),
        ]
    )


def _bars(name: str, x: Sequence[float], means: Sequence[_Json]) -> Curve:
    errors = [mean["error"] or 0.0 for mean in means]
    return Curve(name=name, x=x, y=[mean["mean"] for mean in means], errors=errors)


def _grid(charts: Sequence[Markup]) -> Markup:
    kept = [chart for chart in charts if chart]
    return element("div", *kept, class_="charts") if kept else Markup("")
