"""The report of one or several runs as one JSON document: verdict, what differs, and paired changes with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpmoe.evaluation.allocation import ALLOCATION_RANGES
from sharpmoe.evaluation.statistics import interval_over_images, interval_over_steps, plain_interval
from sharpmoe.report.run_figures import AFTER, changes_of, describe_run, load_allocation
from sharpmoe.report.run_verdict import verdict_of_change, verdict_of_run

_Json = dict[str, Any]

FORMAT = 1  # of the document; rises where a reader of an earlier one would misread it
NOT_SET = "(not set)"  # of a key that a run lacks
_NAMES = ("name", "output")  # keys that differ between any two runs
_ENVIRONMENT = ("version.", "world", "device")  # beginnings of keys that say where a run ran
# Say which images are validated, and in which precision; what a run of an earlier version has without saying it.
_HELD_OUT = dict.fromkeys(("data.shards", "data.validation_split", "log.validation_images")) | {
    "log.look_precision": "fp32"
}
_BY_STEP = ("loss/", "throughput/", "optim/grad_norm")  # curves that two runs have at the same steps
_DRAWN = ("stage", "seed", "data.shards", "data.train_split", "train.global_batch")  # say what a step is trained on


def describe_runs(folders: Sequence[Path | str]) -> _Json:
    """Return the whole document of a report. Raises DataError where a folder is no run.

    The first run is what the others are compared with.
    """
    runs = [describe_run(folder) for folder in folders]
    for run, name in zip(runs, _distinct_names(runs), strict=True):
        run["name"] = name
        run["verdict"] = verdict_of_run(run)
    return {
        "format": FORMAT,
        "runs": runs,
        "differences": _differences(runs),
        "comparisons": [_comparison(runs[0], run) for run in runs[1:]],
    }


def _distinct_names(runs: Sequence[_Json]) -> list[str]:
    names = [run["name"] for run in runs]
    return names if len(set(names)) == len(names) else [run["folder"] for run in runs]


def _differences(runs: Sequence[_Json]) -> _Json:
    """Return the keys that differ between the runs, with a value for each: of the configuration, of the environment."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"] if key not in _NAMES)
    found: _Json = {"configuration": {}, "environment": {}}
    for key in keys:
        values = [NOT_SET if (value := run["settings"].get(key)) in (None, {}) else value for run in runs]
        if any(value != values[0] for value in values):
            place = "environment" if key.startswith(_ENVIRONMENT) else "configuration"
            found[place][key] = values
    return found


def _comparison(first: _Json, other: _Json) -> _Json:
    """Return the paired changes of a run against the first: by image, and by step where curves have the same steps."""
    allocations = [load_allocation(run, AFTER) for run in (first, other)]
    change = {} if None in allocations else changes_of(*allocations)  # type: ignore[arg-type]
    reference = first["allocation"]["results"].get(AFTER)
    names = (other["name"], first["name"])
    return {
        "run": other["name"],
        "against": first["name"],
        "by_image": {what: _in_order(ranges) for what, ranges in change.items()},
        "by_step": _by_step(first, other),
        "verdict": verdict_of_change(change, reference, names),
    }


def _in_order(ranges: Mapping[str, Any]) -> _Json:
    return {name: ranges[name] for name in ALLOCATION_RANGES if name in ranges}


def _by_step(first: _Json, other: _Json) -> _Json:
    """Return changes over the later half of the steps that both curves have, with intervals over blocks of steps.

    Losses and gradients only where a step of both runs is trained on the same images.
    """
    found: _Json = {}
    drawn = [[run["settings"].get(key) for key in _DRAWN] for run in (first, other)]
    kinds = _BY_STEP if drawn[0] == drawn[1] else ("throughput/",)
    for tag, curve in other["curves"].items():
        if not tag.startswith(kinds) or tag not in first["curves"]:
            continue
        here, there = (dict(zip(each["steps"], each["values"], strict=True)) for each in (curve, first["curves"][tag]))
        common = sorted(here.keys() & there.keys())
        later = common[len(common) // 2 :]
        if later and any(here[step] or there[step] for step in later):
            interval = interval_over_steps([here[step] - there[step] for step in later])
            found[tag] = {**(plain_interval(interval) or {}), "steps": len(later), "first": there[later[-1]]}
    paired = _validation_of(first, other)
    if paired is not None:
        return found | {"validation/flow": paired}
    last = [(run["curves"].get("validation/flow") or {"steps": [], "values": []}) for run in (first, other)]
    if all(each["steps"] for each in last) and last[0]["steps"][-1] == last[1]["steps"][-1]:
        values = [each["values"][-1] for each in last]
        bounds = {"low": None, "high": None, "steps": 1, "first": values[0]}
        found["validation/flow"] = {"mean": values[1] - values[0], **bounds}
    return found


def _validation_of(first: _Json, other: _Json) -> _Json | None:
    """Return the change of the last held-out flow loss, paired by image; None where images or steps differ."""
    one, two = first["validation"], other["validation"]
    images = [[run["settings"].get(*item) for item in _HELD_OUT.items()] for run in (first, other)]
    if not one or not two or images[0] != images[1] or one["last"] != two["last"]:
        return None
    before, after = one["per_image"], two["per_image"]
    if len(before) != len(after) or len(before) < 2:
        return None
    interval = interval_over_images([b - a for a, b in zip(before, after, strict=True)])
    return {**(plain_interval(interval) or {}), "steps": 1, "first": sum(before) / len(before)}
