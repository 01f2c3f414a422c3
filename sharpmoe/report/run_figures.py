"""What a run folder tells: its log, allocations, pictures and configuration as JSON values, whatever of them is there.

`describe_run` is the one reader behind the console table, the JSON file and the page of `launcher/report.py`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import Allocation, ImageMean, paired_interval
from sharpmoe.evaluation.statistics import interval_over_images, interval_over_steps, plain_interval
from sharpmoe.flow import TIME_RANGES
from sharpmoe.log_file import LOG_FILE, read_log, read_log_lines
from sharpmoe.report.routing_sheet import RoutingSheet

Json = dict[str, Any]
Curves = Mapping[str, Mapping[int, float]]  # tag -> step -> value

BEFORE, AFTER = "before", "after"  # names that a run gives its two allocations
_MAX_POINTS = 300  # of a curve: more than a plot has pixels
_SHOWN_EVENTS = frozenset({"stop", "fault", "save failed", "callback failed", "resume"})
_LAYER = re.compile(r"/layer(\d+)$")
_BY_LAYER = "by layer"  # section of curves that are reduced over MoE layers
_FIGURES = ("saliency", "foreground", "experts", "flow", "flow_markov")  # of an allocation, by range of t


def _runs_below(folder: Path) -> str:
    """Name the runs of a folder of runs, eight at most; "" where there are none."""
    runs = sorted(str(path.parent) for path in folder.glob(f"*/{LOG_FILE}"))
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f", as {', '.join(runs[:8])}{more}" if runs else ""


def describe_run(folder: Path | str) -> Json:
    """Return everything known of a run as JSON values. Raises DataError where the folder holds no log.

    What is missing or damaged is left out and named under "notes". A run that is still being written is read as far as
    it has come.
    """
    folder = Path(folder)
    notes: list[str] = []
    log = folder / LOG_FILE
    if not log.is_file():
        raise DataError(f"{folder}: no {LOG_FILE}; expected the folder of a run (runs/<name>){_runs_below(folder)}")
    curves, lines = read_log(log), read_log_lines(log)
    starts = [line for line in lines if line.get("event") == "start"]
    settings = _settings(starts, folder / "config.yaml", notes)
    validations = _validations(lines)
    done = max((step for points in curves.values() for step in points), default=0)
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "settings": settings,
        "progress": {
            "done": done,
            "total": settings.get("train.steps"),
            "starts": [{"time": str(line.get("time", "")), "step": line["step"]} for line in starts],
        },
        "events": _events(lines),
        "warnings": list(dict.fromkeys(str(line.get("text", "")) for line in lines if line.get("event") == "warning")),
        "curves": _with_errors({tag: _thinned(points) for tag, points in reduced_curves(curves).items()}, validations),
        "validation": _validation_change(validations),
        "layers": _layers(curves),
        "speed": _speed(curves),
        "flops": _flops(curves, settings, done),
        "allocation": _allocations(folder / "allocation", notes),
        "pictures": {kind: _pictures(folder / kind) for kind in ("samples", "routing")},
        "notes": notes,
    }


def load_allocation(run: Json, name: str) -> Allocation | None:
    """Return an allocation of a described run, None where it has none that can be read."""
    if name not in run["allocation"]["results"]:
        return None
    return Allocation.load(Path(run["folder"]) / "allocation" / f"{name}.json")


def load_routing(run: Json) -> dict[int, RoutingSheet]:
    """Return the stored routing of the first and the last step that have one, by step; damaged files are left out."""
    stored = [picture for picture in run["pictures"]["routing"] if picture["data"]]
    found = {}
    for picture in [*stored[:1], *stored[1:][-1:]]:
        try:
            found[int(picture["step"] or 0)] = RoutingSheet.load(Path(run["folder"]) / picture["data"])
        except DataError as error:
            run["notes"].append(str(error))
    return found


def reduced_curves(curves: Curves) -> dict[str, Mapping[int, float]]:
    """Replace curves of single MoE layers by their mean, least and largest value over the layers."""
    whole: dict[str, Mapping[int, float]] = {}
    groups: dict[str, list[Mapping[int, float]]] = {}
    for tag, points in curves.items():
        match = _LAYER.search(tag)
        if match:
            groups.setdefault(tag[: match.start()], []).append(points)
        else:
            whole[tag] = points
    ways: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "least": min, "largest": max}
    for group, layers in groups.items():
        for way, reduce in ways.items() if layers[1:] else [("mean", statistics.fmean)]:
            steps = sorted(set.intersection(*(set(points) for points in layers)))
            whole[f"{group}/{way}"] = {step: reduce([points[step] for points in layers]) for step in steps}
    return {tag: points for tag, points in whole.items() if points}


def changes_of(before: Allocation, after: Allocation) -> Json:
    """Return the paired changes of every figure with values per image: figure -> range of t -> interval over images."""
    found: Json = {}
    for what, ranges in after.per_image.items():
        for name in ranges:
            interval = paired_interval(before, after, what, name)
            if interval.images:
                found.setdefault(what, {})[name] = plain_interval(interval)
    return found


def natural(text: str) -> list[tuple[int, str]]:
    """Return a key that orders names by the numbers in them."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _settings(starts: Sequence[Json], config: Path, notes: list[str]) -> Json:
    """Return the flat settings of the last start, or where the log has none, those of config.yaml."""
    given = [line["settings"] for line in starts if isinstance(line.get("settings"), dict)]
    stored: Json = given[-1] if given else {}
    if stored or not config.is_file():
        return dict(stored)
    try:
        return _flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{config.name}: cannot be read ({' '.join(str(error).split())})")
        return {}


def _flat(node: object, prefix: str = "") -> Json:
    if not isinstance(node, dict) or not node:
        return {prefix: node} if prefix else {}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _events(lines: Sequence[Json]) -> list[Json]:
    """Return what happened beside steps: stops, faults, checkpoints that could not be saved."""
    kept = [line for line in lines if line.get("event") in _SHOWN_EVENTS]
    return [{key: value for key, value in line.items() if key != "run"} for line in kept]


def _validations(lines: Sequence[Json]) -> dict[int, list[float]]:
    """Return the flow loss of every held-out image by step, of the steps that the run continued from."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if line.get("event") == "start":
            found = {step: values for step, values in found.items() if step <= line["step"]}
        elif line.get("event") == "validation" and line.get("per_image"):
            found[line["step"]] = [float(value) for value in line["per_image"]]
    return dict(sorted(found.items()))


def _with_errors(curves: dict[str, Json], validations: Mapping[int, Sequence[float]]) -> dict[str, Json]:
    """Add the standard errors over images to the curve of the held-out flow loss, where there are several images."""
    curve = curves.get("validation/flow")
    if curve is not None:
        known = {step: values for step, values in validations.items() if len(values) > 1}
        errors = [
            statistics.stdev(known[step]) / math.sqrt(len(known[step])) if step in known else None
            for step in curve["steps"]
        ]
        if any(error is not None for error in errors):
            curve["errors"] = errors
    return curves


def _validation_change(validations: Mapping[int, Sequence[float]]) -> Json:
    """Return the change of the held-out flow loss from the first to the last validation, paired by image."""
    if not validations:
        return {}
    first, last = min(validations), max(validations)
    found: Json = {"first": first, "last": last, "per_image": list(validations[last])}
    if last > first and len(validations[first]) == len(validations[last]):
        differences = [b - a for a, b in zip(validations[first], validations[last], strict=True)]
        found["change"] = plain_interval(interval_over_images(differences))
    return found


def _thinned(points: Mapping[int, float]) -> Json:
    """Return a curve as two lists; of a long one, the least and the largest value of each stretch of steps."""
    steps = list(points)
    if len(steps) > _MAX_POINTS:
        size = math.ceil(2 * len(steps) / _MAX_POINTS)
        parts = [steps[at : at + size] for at in range(0, len(steps), size)]
        extreme = {step for part in parts for step in (min(part, key=points.get), max(part, key=points.get))}  # type: ignore[arg-type]
        steps = sorted(extreme | {steps[0], steps[-1]})
    return {"steps": steps, "values": [points[step] for step in steps]}


def _layers(curves: Curves) -> Json:
    """Return the last figure of every MoE layer: figure -> values in the order of the layers."""
    found: dict[str, dict[int, float]] = {}
    for tag, points in curves.items():
        match = _LAYER.search(tag)
        if match:
            found.setdefault(tag[: match.start()], {})[int(match[1])] = points[max(points)]
    return {what: [rows.get(layer) for layer in range(max(rows) + 1)] for what, rows in found.items()}


def _speed(curves: Curves) -> Json:
    """Return means of the figures of speed with intervals over steps, without the first, and the peak of memory."""
    found: Json = {}
    for tag, points in curves.items():
        if tag.startswith("throughput/"):
            later = list(points.values())[1:] or list(points.values())
            found[tag.partition("/")[2]] = {**(plain_interval(interval_over_steps(later)) or {}), "steps": len(later)}
    if "memory/peak_mib" in curves:
        found["peak_mib"] = max(curves["memory/peak_mib"].values())
    return found


def _flops(curves: Curves, settings: Json, done: int) -> Json:
    """Return FLOPs per trained image by what they are spent on, and of all steps so far."""
    parts = {
        tag.rpartition("/")[2]: statistics.fmean(points.values())
        for tag, points in curves.items()
        if tag.startswith("flops/per_image/")
    }
    images = settings.get("train.global_batch")
    total = sum(parts.values()) * images * done if parts and isinstance(images, int) else None
    return {"per_image": parts, "total": total} if parts else {}


def _allocations(folder: Path, notes: list[str]) -> Json:
    """Return the allocations of a run, before training first, and the paired change of the whole run."""
    ends = {BEFORE: 0, AFTER: 2}
    loaded: dict[str, Allocation] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (ends.get(path.stem, 1), natural(path.stem))):
        try:
            loaded[path.stem] = Allocation.load(path)
        except DataError as error:
            notes.append(str(error))
    both = BEFORE in loaded and AFTER in loaded
    return {
        "results": {name: _plain_allocation(result) for name, result in loaded.items()},
        "change": changes_of(loaded[BEFORE], loaded[AFTER]) if both else {},
    }


def _plain_allocation(result: Allocation) -> Json:
    """Return the means of an allocation as JSON values, without the values of single images."""
    return {
        **{what: {name: _mean(e) for name, e in getattr(result, what).items()} for what in _FIGURES},
        "saliency_by_time": [[t, _mean(e)] for t, e in result.saliency_by_time.items()],
        "experts_by_saliency": [_mean(e) for e in result.experts_by_saliency.get("all t", ())],
        "strength": result.strength,
        "images": result.images,
        "split": result.split,
    }


def _mean(value: ImageMean) -> Json | None:
    """Return a mean with its standard error; None where no image has a value."""
    if not value.images:
        return None
    return {"mean": value.mean, "error": None if math.isnan(value.error) else value.error, "images": value.images}


def _pictures(folder: Path) -> list[Json]:
    """Return the pictures of samples/ or routing/ in the order of their steps, with the files of their content."""
    files = sorted(folder.glob("*.png"), key=lambda path: natural(path.stem))
    return [
        {
            "step": int(number) if (number := path.stem.removeprefix("step")).isdecimal() else None,
            "file": f"{folder.name}/{path.name}",
            "data": f"{folder.name}/{path.stem}.npz" if path.with_suffix(".npz").is_file() else None,
        }
        for path in files
    ]


def strength_at_the_end(run: Json) -> Json:
    """Return spread, flipped and agreement of the saliency routers: on held-out images, or else in the last step."""
    after = run["allocation"]["results"].get(AFTER, {})
    measured = after.get("strength", {}).get("all", {}).get("all t", {})
    if measured:
        return dict(measured)
    found: dict[str, float] = {}
    for what in ("spread", "flipped", "agreement"):
        tags = [f"saliency_{what}_{name.replace(' ', '')}/mean" for name in TIME_RANGES]
        values = [run["curves"][tag]["values"][-1] for tag in tags if tag in run["curves"]]
        if values:
            found[what] = statistics.fmean(values)
    return found
