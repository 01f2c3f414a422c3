"""One static HTML page for a run folder: curves of log.jsonl, allocation tables, sample grids, routing sheets."""

from __future__ import annotations

import base64
import html
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import Allocation
from sharpmoe.evaluation.allocation_table import allocation_table
from sharpmoe.flow import TIME_RANGES
from sharpmoe.log_file import LOG_FILE, read_log, read_log_lines
from sharpmoe.report import figures

_ENDS = {"before": 0, "after": 2}  # names that a run gives its two tables

_MIXED = ("optim", "throughput", "memory")  # groups of tags whose figures have several units: a plot each
_FIRST = ("loss", "validation", *_MIXED)  # groups that are shown first; the others are folded away
_UNITS = {
    "optim/lr": "learning rate",
    "throughput/images_per_second": "images per second",
    "throughput/tokens_per_second": "tokens per second",
    "throughput/seconds_per_step": "seconds",
    "throughput/data_wait_share": "share of the step",
    "throughput/tflops_per_rank": "TFLOP/s",
    "throughput/mfu": "share of the peak rate",
    "memory/peak_mib": "MiB",
    "flops": "FLOPs per image",
    "validation": "flow loss",
}
_STRENGTH = {
    "spread": "spread of their logits over that of the gates'",
    "flipped": "share of choices that the gate alone would not make",
    "agreement": "correlation of experts per token with M",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100%; vertical-align: top } figure { margin: 1em 0 } figcaption { color: #666 }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; line-height: 1.35; font-size: 13px }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 8px }
.curves img { width: 100% }
.summary { border-collapse: collapse } .summary td { padding: 2px 16px 2px 0; vertical-align: top }
.summary td:first-child { color: #666; white-space: nowrap } summary { cursor: pointer; margin: 1em 0 }
"""
_HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)


def write_page(folder: Path | str) -> Path:
    """Write <run folder>/report.html and return its path. Raises DataError where the folder holds no log."""
    folder = Path(folder)
    log = folder / LOG_FILE
    if not log.is_file():
        raise DataError(f"{folder}: no {LOG_FILE}; expected the folder of a run (runs/<name>)")
    curves = read_log(log)
    first = {tag: points for tag, points in curves.items() if tag.partition("/")[0] in _FIRST}
    others = {tag: points for tag, points in curves.items() if tag not in first}
    parts = [
        f"<h1>{html.escape(folder.resolve().name)}</h1>",
        _summary(read_log_lines(log), curves),
        _section("Allocation", _allocation(folder / "allocation")),
        _section("Strength of the saliency routers, mean over MoE layers", _strength(curves)),
        _section("Samples", _pictures(folder, "samples")),
        _section("Curves", _curves(first) + _folded("Routing, saliency and FLOPs, by layer and time", _curves(others))),
        _section("Routing: experts per token at each denoising step", _pictures(folder, "routing")),
        _section("Configuration", _configuration(folder / "config.yaml")),
    ]
    page = f"{_HEAD}<title>{html.escape(folder.resolve().name)}</title><style>{_STYLE}</style>"
    path = folder / "report.html"
    write_atomically(path, page + "\n".join(part for part in parts if part) + "\n")
    return path


def _summary(lines: list[dict[str, Any]], curves: Mapping[str, Mapping[int, float]]) -> str:
    """Return a table of what the run is and how far it has come, from its log alone."""
    starts = [line for line in lines if line.get("event") == "start"]
    settings: dict[str, Any] = starts[-1].get("settings", {}) if starts else {}
    done = max((step for points in curves.values() for step in points), default=0)
    kind = f"{settings.get('stage', '')}, {settings.get('model.router', '')}, {settings.get('world', '?')} rank(s)"
    versions = {name: settings.get(f"version.{name}") for name in ("torch", "deepspeed", "commit")}
    again = f", {len(starts) - 1} time(s) again" if starts[1:] else ""
    rows = {
        "run": kind if settings else "",
        "steps": f"{done} of {settings['train.steps']}" if "train.steps" in settings else f"{done}",
        "started": f"{starts[0].get('time', '')}{again}" if starts else "",
        "loss": _first_and_last(curves.get("loss/total", {})),
        "held-out flow loss": _first_and_last(curves.get("validation/flow", {})),
        "speed": _median(curves.get("throughput/images_per_second", {}), "images per second (median)"),
        "memory": _largest(curves.get("memory/peak_mib", {}), "MiB at the peak, on one rank"),
        "warnings": "; ".join(dict.fromkeys(line["text"] for line in lines if line.get("event") == "warning")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    cells = [f"<tr><td>{name}<td>{html.escape(text)}" for name, text in rows.items() if text]
    return f'<table class="summary">{"".join(cells)}</table>'


def _first_and_last(points: Mapping[int, float]) -> str:
    if not points:
        return ""
    first, last = min(points), max(points)
    return f"{points[first]:.4g} (step {first}) to {points[last]:.4g} (step {last})"


def _median(points: Mapping[int, float], unit: str) -> str:
    return f"{statistics.median(points.values()):.4g} {unit}" if points else ""


def _largest(points: Mapping[int, float], unit: str) -> str:
    return f"{max(points.values()):.4g} {unit}" if points else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>\n{body}\n</details>" if body else ""


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{body}" if body else ""


def _allocation(folder: Path) -> str:
    """Return table and curves of allocation/*.json: before training first, after it last, others by name."""
    files = sorted(folder.glob("*.json"), key=lambda path: (_ENDS.get(path.stem, 1), _natural(path)))
    results = {path.stem: Allocation.load(path) for path in files}
    if not results:
        return ""
    curves = _embedded(figures.allocation_curves(results), "allocation")
    return f"<pre>{html.escape(allocation_table(results))}</pre>\n{curves}"


def _strength(curves: Mapping[str, Mapping[int, float]]) -> str:
    """Return a plot per figure of strength, one curve per range of t."""
    plots = []
    for what, title in _STRENGTH.items():
        lines = {
            name: _mean_curve([points for tag, points in curves.items() if tag.startswith(_strength_tag(what, name))])
            for name in TIME_RANGES
        }
        known = {name: points for name, points in lines.items() if points}
        if known:
            plots.append(_embedded(figures.step_curves(known, title), title))
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def _strength_tag(what: str, name: str) -> str:
    return f"saliency_{what}_{name.replace(' ', '')}/"


def _mean_curve(layers: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean over layers at each step that all of them have."""
    steps = sorted(set.intersection(*(set(points) for points in layers))) if layers else []
    return {step: statistics.fmean(points[step] for points in layers) for step in steps}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that orders names by the numbers in them, whatever the times of the files are."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _pictures(folder: Path, kind: str) -> str:
    """Return the last and the first picture of samples/ or routing/, those between folded away."""
    files = sorted((folder / kind).glob("*.png"), key=_natural, reverse=True)
    shown = [_figure(kind, path) for path in files]
    between = _folded(f"{len(shown) - 2} between", "\n".join(shown[1:-1])) if shown[2:] else ""
    return "\n".join([*shown[:1], between, *shown[1:][-1:]])


def _figure(kind: str, path: Path) -> str:
    number = path.stem.removeprefix("step")
    title = f"{kind}, step {int(number)}" if number.isdecimal() else path.stem
    source, title = html.escape(f"{kind}/{path.name}"), html.escape(title)
    return f'<figure><img loading="lazy" src="{source}" alt="{title}"><figcaption>{title}</figcaption></figure>'


def _curves(log: Mapping[str, Mapping[int, float]]) -> str:
    """Return one plot per group of tags (the part before the slash) of one unit, together in one block."""
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for tag, points in log.items():
        group, _, name = tag.partition("/")
        if any(points.values()) or group != "loss":  # losses that the run does not use are always 0
            groups.setdefault(tag if group in _MIXED else group, {})[name or tag] = points
    rank = {group: number for number, group in enumerate(_FIRST)}
    order = sorted(groups, key=lambda key: rank.get(key.partition("/")[0], len(rank)))
    plots = [_embedded(figures.step_curves(groups[key], key, unit=_UNITS.get(key, "")), key) for key in order]
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def _configuration(path: Path) -> str:
    if not path.is_file():
        return ""
    return _folded("all keys of the run", f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>")


def _embedded(pixels: figures.Pixels, title: str) -> str:
    """Return a picture embedded in the page, so that a copied page keeps its curves."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">'
