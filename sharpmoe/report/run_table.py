"""Tables of a report, made of its document: the same rows go to the console and to the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sharpmoe.evaluation.allocation import ALLOCATION_RANGES, IMAGE_PARTS, NUM_FIFTHS
from sharpmoe.evaluation.allocation_table import measured_images
from sharpmoe.report.run_figures import AFTER
from sharpmoe.report.run_set import NOT_SET
from sharpmoe.report.run_verdict import interval_text

_Json = dict[str, Any]

TITLES = {
    "saliency": "rank correlation of experts per token with saliency M",
    "foreground": "rank correlation with the foreground mask",
    "experts": "experts per token, MoE layer and step (compute)",
    "flow": "flow loss",
    "flow_markov": "flow loss, noise of a Markov chain",
}
_MARKS = {"good": "+", "bad": "-", "warning": "!", "note": " ", "unknown": "?"}
_STRENGTH = {
    "spread": "saliency router: spread of its logits, over the gate's",
    "flipped": "saliency router: share of choices changed",
}
_BY_LAYER = {
    "routing_load_min": "least load / mean",
    "routing_load_max": "largest load / mean",
    "routing_dead_experts": "dead experts",
    "routing_entropy": "entropy / maximum",
    "routing_flipped": "choices changed",
}
_WIDTH = 76  # characters of a console cell, at most


class ReportTable(NamedTuple):
    """A table of a report: the first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def short_number(value: object) -> str:
    """Return a figure in at most four significant digits; "" for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def console_report(document: _Json) -> str:
    """Return verdicts and tables as text."""
    lines = []
    for run in document["runs"]:
        lines += [run["name"], *verdict_text(run["verdict"])]
    for comparison in document["comparisons"]:
        lines += verdict_text(comparison["verdict"])
    return "\n".join([*lines, *(_as_text(table) for table in console_tables(document))])


def verdict_text(findings: Sequence[_Json]) -> list[str]:
    """Return the sentences of a verdict as lines, each with the mark of its level."""
    return [f"  {_MARKS[each['level']]} {each['text']}" for each in findings]


def console_tables(document: _Json) -> Iterator[ReportTable]:
    """Yield the tables that a console shows."""
    runs = document["runs"]
    yield overview(runs)
    if len(runs) == 1:
        yield from allocation_tables(runs[0])
    yield from difference_tables(document)


def overview(runs: Sequence[_Json]) -> ReportTable:
    """Return what the runs are and how far they came, a column for each."""
    cells = [_facts(run) for run in runs]
    rows = [(name, *(each.get(name, "") for each in cells)) for name in cells[0]]
    return ReportTable("Overview", ("", *(run["name"] for run in runs)), [row for row in rows if any(row[1:])])


def allocation_tables(run: _Json) -> Iterator[ReportTable]:
    """Yield the allocations of a run by range of t, with the paired change from before to after."""
    results, change = run["allocation"]["results"], run["allocation"]["change"]
    if not results:
        return
    first = next(iter(results.values()))
    rows = []
    for what, title in TITLES.items():
        for name in ALLOCATION_RANGES:
            cells = [mean_text(result[what].get(name)) for result in results.values()]
            if any(cells):
                changed = [interval_text(change.get(what, {}).get(name))] if change else []
                rows.append((f"{title}, {name}", *cells, *changed))
    for what, title in _STRENGTH.items():
        values = [r["strength"].get("all", {}).get("all t", {}).get(what) for r in results.values()]
        if any(value is not None for value in values):
            rows.append((title, *map(short_number, values), *([""] if change else [])))
    of = measured_images(first["images"], filter(None, [first["split"]]))
    title = f"Allocation on {of} (± standard error; change paired by image, 95 %)"
    head = ("", *results, *(["change"] if change else []))
    yield ReportTable(title, head, rows)


def difference_tables(document: _Json) -> Iterator[ReportTable]:
    """Yield what differs between runs: configuration, environment, and paired changes."""
    runs = document["runs"]
    if not runs[1:]:
        return
    names = tuple(run["name"] for run in runs)
    for place, keys in document["differences"].items():
        rows = [(key, *map(setting_text, values)) for key, values in keys.items()]
        if rows:
            yield ReportTable(f"{place.capitalize()}: keys that differ", ("", *names), rows)
    for comparison in document["comparisons"]:
        by_image = comparison["by_image"]
        order = sorted(by_image, key=lambda what: list(TITLES).index(what) if what in TITLES else len(TITLES))
        rows = [
            (figure_title(what), *(interval_text(by_image[what].get(name)) for name in ALLOCATION_RANGES))
            for what in order
        ]
        if rows:
            pair = f"{comparison['run']} against {comparison['against']}"
            title = f"{pair}: change after training, paired by held-out image (95 %, over images)"
            yield ReportTable(title, ("", *ALLOCATION_RANGES), rows)
    by_step = [comparison["by_step"] for comparison in document["comparisons"]]
    tags = dict.fromkeys(tag for each in by_step for tag in each)
    rows = [(tag, *(interval_text(each.get(tag)) for each in by_step)) for tag in tags]
    if rows:
        title = f"In training, against {names[0]}: change, paired by step (95 %, later half of the steps, in blocks)"
        yield ReportTable(title, ("", *names[1:]), rows)


def layer_table(run: _Json) -> ReportTable:
    """Return figures of every MoE layer: in the last logged step, and agreement with M on held-out images by time."""
    columns = {title: run["layers"][what] for what, title in _BY_LAYER.items() if what in run["layers"]}
    strength = run["allocation"]["results"].get(AFTER, {}).get("strength", {})
    count = max([len(values) for values in columns.values()] + [len(strength) - ("all" in strength)], default=0)
    for name in ALLOCATION_RANGES:
        found = [strength.get(f"layer{layer}", {}).get(name, {}).get("agreement") for layer in range(count)]
        if any(value is not None for value in found):
            columns[f"agreement with M, {name}"] = found
    rows = [
        (f"layer {layer}", *(short_number(_at(values, layer)) for values in columns.values())) for layer in range(count)
    ]
    return ReportTable("MoE layers", ("", *columns), rows)


def flop_table(run: _Json) -> ReportTable:
    """Return what the FLOPs of a trained image are spent on, and those of the run so far."""
    parts = run["flops"].get("per_image", {})
    whole = sum(parts.values()) or 1.0
    rows = [(name, f"{value:.4g}", f"{value / whole:.1%}") for name, value in parts.items()]
    if run["flops"].get("total"):
        rows.append(("all steps so far", f"{run['flops']['total']:.4g}", ""))
    return ReportTable("FLOPs", ("", "per trained image", "share"), rows)


def figure_title(what: str) -> str:
    """Return the title of a key of `Allocation.per_image`."""
    if what in TITLES:
        return TITLES[what]
    return what.replace("flow, ", "flow loss of the ").replace("5th", "fifth")


def fifth_names() -> list[str]:
    """Return the names of the fifths of tokens by saliency."""
    return [part.replace("5th", "fifth").replace(" fifth", "") for part in IMAGE_PARTS[:NUM_FIFTHS]]


def mean_text(value: Mapping[str, Any] | None) -> str:
    """Return a mean with its standard error, which one image has not; "" for None."""
    if value is None:
        return ""
    alone = " (1 image)" if value["images"] == 1 else ""
    return f"{value['mean']:.4f}" + (alone if value["error"] is None else f" ± {value['error']:.4f}")


def setting_text(value: object) -> str:
    """Return a value of the configuration as it is written in a run file."""
    return NOT_SET if value == NOT_SET else json.dumps(value, ensure_ascii=False)


def _short(cell: str) -> str:
    return cell if len(cell) <= _WIDTH else cell[: _WIDTH - 1] + "…"


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _facts(run: _Json) -> dict[str, str]:
    settings, progress, speed = run["settings"], run["progress"], run["speed"]
    starts, total = progress["starts"], progress["total"]
    kind = [settings.get(key) for key in ("stage", "model.preset", "model.router", "train.precision")]
    again = f", {len(starts) - 1} time(s) again" if starts[1:] else ""
    ranks = f"{settings['world']} x {settings.get('device', '?')}" if "world" in settings else ""
    flops = run["flops"].get("total")
    change = run["validation"].get("change")
    versions = {name: settings.get(f"version.{name}") for name in ("sharpmoe", "torch", "deepspeed", "commit")}
    return {
        "run": ", ".join(str(part) for part in kind if part),
        "steps": f"{progress['done']} of {total}" if total is not None else str(progress["done"]),
        "started": f"{starts[0]['time']}{again}" if starts else "",
        "loss": _first_and_last(run["curves"].get("loss/total")),
        "held-out flow loss": _first_and_last(run["curves"].get("validation/flow")),
        "its change, paired by image": interval_text(change) if change else "",
        "samples against held-out images": _sample_metrics(run["curves"]),
        "images per second": interval_text(speed.get("images_per_second"), "") if speed else "",
        "waiting for data": _share(speed.get("data_wait_share")),
        "peak memory": f"{short_number(float(speed['peak_mib']))} MiB of a rank" if "peak_mib" in speed else "",
        "ranks": ranks,
        "FLOPs so far": f"{flops:.3g}" if flops else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def _share(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.1%} of a step"


def _sample_metrics(curves: Mapping[str, _Json]) -> str:
    """Return the figures of judged samples, first and last."""
    found = {tag.partition("/")[2]: curve for tag, curve in curves.items() if tag.startswith("metrics/")}
    return "; ".join(f"{name} {_first_and_last(curve)}" for name, curve in found.items())


def _first_and_last(curve: _Json | None) -> str:
    if curve is None:
        return ""
    steps, values = curve["steps"], curve["values"]
    errors = curve.get("errors") or [None] * len(steps)
    first, last = (
        f"{values[at]:.4g}" + ("" if errors[at] is None else f" ± {errors[at]:.2g}") + f" (step {steps[at]})"
        for at in (0, -1)
    )
    return f"{first} to {last}"


def _as_text(table: ReportTable) -> str:
    """Return a table with columns as wide as their cells."""
    rows = [[_short(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["", table.title, *lines])
