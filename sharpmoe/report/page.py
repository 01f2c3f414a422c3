"""The page of a report: one HTML file with everything inside, made of its document and the pictures of the runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sharpmoe.durable import write_atomically
from sharpmoe.report.charts import allocation_charts, curve_charts, health_charts, overlaid_charts
from sharpmoe.report.embedded import PAGE_MIB, PictureBudget
from sharpmoe.report.maps import compute_maps
from sharpmoe.report.markup import element, folded, joined, section, table
from sharpmoe.report.page_style import PAGE_STYLE
from sharpmoe.report.run_figures import load_routing
from sharpmoe.report.run_set import describe_runs
from sharpmoe.report.run_table import (
    ReportTable,
    allocation_tables,
    difference_tables,
    flop_table,
    layer_table,
    overview,
    setting_text,
)

_Json = dict[str, Any]

_ENVIRONMENT = ("version.", "world", "device", "zero.")  # beginnings of settings that are no keys of the run file


def write_report(folders: Sequence[Path | str], out: Path | None = None) -> tuple[Path, _Json]:
    """Write the page of one or several runs and its document beside it (.json); return the page and the document.

    out: the page; by default report.html in the folder of a single run, or beside the first of several. Raises
    DataError where a folder is no run.
    """
    document = describe_runs(folders)
    first = Path(folders[0])
    path = out or (first if len(folders) == 1 else first.resolve().parent) / "report.html"
    write_atomically(path, report_page(document))
    write_atomically(path.with_suffix(".json"), json.dumps(document, allow_nan=False, indent=1) + "\n")
    return path, document


def report_page(document: _Json) -> str:
    """Return the page of a report's document. Pictures are read from the folders of its runs, and bounded together."""
    runs, budget = document["runs"], PictureBudget()
    title = " · ".join(run["name"] for run in runs)
    body = [element("h1", title), _banner(document), section("Overview", _plain(overview(runs)))]
    if runs[1:]:
        body += [*_comparison(document, budget), *(_single(run, budget, folds=True) for run in runs)]
    else:
        body.append(_single(runs[0], budget, folds=False))
    if budget.left_out:
        left = f"{len(budget.left_out)} picture(s) had no room: a page holds {PAGE_MIB} MiB of them. Left out: "
        body.append(element("p", left + ", ".join(budget.left_out), class_="dim"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(PAGE_STYLE)),
    ]
    whole = element("html", element("head", *head), element("body", *(part for part in body if part)), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _banner(document: _Json) -> Markup:
    """Return the verdict: of comparisons first, then of every run."""
    runs, several = document["runs"], len(document["runs"]) > 1
    lines = [_finding(each) for comparison in document["comparisons"] for each in comparison["verdict"]]
    for run in runs:
        lines += [_finding(each, f"{run['name']}: " if several else "") for each in run["verdict"]]
    if not lines:
        lines = [_finding({"level": "note", "text": "nothing stands out in what was measured"})]
    return element("ul", *lines, class_="verdict")


def _finding(finding: Mapping[str, str], prefix: str = "") -> Markup:
    return element("li", prefix + finding["text"], class_=finding["level"])


def _comparison(document: _Json, budget: PictureBudget) -> Iterator[Markup]:
    """Yield the sections that show several runs together."""
    runs = document["runs"]
    for each in difference_tables(document):
        yield section(each.title, _plain(each))
    sheets = {run["name"]: sheet for run in runs for sheet in list(load_routing(run).values())[-1:]}
    yield section("Where compute goes, after training", compute_maps(sheets))
    yield section("Curves", overlaid_charts(runs))
    results = {
        f"{run['name']}, {name}": result
        for run in runs
        for name, result in list(run["allocation"]["results"].items())[-1:]
    }
    yield section("Allocation, after training", allocation_charts(results))
    last = [(run, run["pictures"]["samples"][-1]) for run in runs if run["pictures"]["samples"]]
    shown = [_picture(run, picture, "samples", budget, run["name"]) for run, picture in last]
    yield section("Samples", element("div", *shown, class_="beside") if shown else "")


def _single(run: _Json, budget: PictureBudget, folds: bool) -> Markup:
    """Return the sections of one run, folded away on a page of several."""
    routing = {f"step {step}": sheet for step, sheet in load_routing(run).items()}
    tables = [_plain(each) for each in allocation_tables(run)]
    parts = [
        section("Where compute goes: before and after", compute_maps(routing), _sheets(run, budget)),
        section("Loss and validation", curve_charts(run, ("loss", "validation", "validation_live"))),
        section("Allocation", allocation_charts(run["allocation"]["results"]), folded("all figures", *tables)),
        section("Samples at equal seeds", curve_charts(run, ("metrics",)), _samples(run, budget)),
        section("Inside sampling", *_looks(run, budget)),
        section("Experts and saliency routers", health_charts(run), _plain(layer_table(run))),
        section("FLOPs", _plain(flop_table(run)), *_token_flops(run, budget)),
        section("Speed, memory and optimizer", curve_charts(run, ("throughput", "memory", "optim"))),
        section("Configuration", *_configuration(run)),
        section("What happened", _events(run)),
    ]
    if not folds:
        return joined(parts)
    return element("details", element("summary", f"{run['name']}: the whole run"), *parts, class_="run")


def _plain(each: ReportTable) -> Markup:
    return table(each.head, each.rows) if each.rows else Markup("")


def _samples(run: _Json, budget: PictureBudget) -> Markup:
    """Return the first and the last samples beside each other, those between folded away."""
    pictures = run["pictures"]["samples"]
    shown = [_picture(run, picture, "samples", budget) for picture in [*pictures[:1], *pictures[1:][-1:]]]
    between = [_picture(run, picture, "samples", budget) for picture in pictures[1:-1]]
    beside = element("div", *shown, class_="beside") if shown else Markup("")
    return beside + folded(f"{len(between)} between", *between)


def _looks(run: _Json, budget: PictureBudget) -> list[Markup]:
    """Return what `sample.py --film` and `--counterfactual` drew."""
    return [budget.file(path, path.stem) for path in sorted((Path(run["folder"]) / "looks").glob("*.png"))]


def _token_flops(run: _Json, budget: PictureBudget) -> list[Markup]:
    """Return where a token's FLOPs went, as `evaluate.py --out` a folder of the run drew it."""
    found = sorted(path for pattern in ("flops_*.png", "*/flops_*.png") for path in Path(run["folder"]).glob(pattern))
    return [budget.file(path, f"FLOPs of a token: {path.stem.removeprefix('flops_')}") for path in found]


def _sheets(run: _Json, budget: PictureBudget) -> Markup:
    """Return the routing sheets of the first and the last step, which show every denoising step."""
    pictures = run["pictures"]["routing"]
    shown = [_picture(run, picture, "routing", budget) for picture in [*pictures[:1], *pictures[1:][-1:]]]
    return folded("experts per token at each denoising step (each sheet on a scale of its own)", *shown)


def _picture(run: _Json, picture: Mapping[str, Any], kind: str, budget: PictureBudget, name: str = "") -> Markup:
    step = picture["step"]
    title = f"{kind}, step {step}" if step is not None else Path(picture["file"]).stem
    return budget.file(Path(run["folder"]) / picture["file"], f"{name}: {title}" if name else title)


def _configuration(run: _Json) -> Iterator[Markup]:
    """Yield the environment and all keys, folded."""
    settings = run["settings"]
    around = {key: value for key, value in settings.items() if key.startswith(_ENVIRONMENT)}
    keys = {key: value for key, value in settings.items() if key not in around}
    for title, part in (("all keys of the run", keys), ("environment and ZeRO", around)):
        rows = [(key, setting_text(value)) for key, value in part.items()]
        yield folded(title, table((), rows)) if rows else Markup("")


def _events(run: _Json) -> Markup:
    """Return warnings, stops, faults and what of the folder could not be read."""
    starts = [f"started at step {start['step']}, {start['time']}" for start in run["progress"]["starts"][1:]]
    told = [
        f"{event['event']} after step {event['step']}: "
        + ", ".join(f"{key} {setting_text(value)}" for key, value in event.items() if key not in ("event", "step"))
        for event in run["events"]
    ]
    notes = [f"not readable: {note}" for note in run["notes"]]
    lines = [element("li", line) for line in (*run["warnings"], *starts, *told, *notes)]
    return element("ul", *lines, class_="events") if lines else Markup("")
