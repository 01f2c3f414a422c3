"""The table of a study: means of every arm, paired differences to the control with intervals, and curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sharpmoe.durable import write_atomically
from sharpmoe.evaluation.allocation import Allocation
from sharpmoe.report.figures import Pixels, render_figure, save_png
from sharpmoe.study.measure import read_measured
from sharpmoe.study.plan import Arm, Study
from sharpmoe.study.statistics import Interval, interval_of


class _Column(NamedTuple):
    """A figure that every image has: a key of `Allocation.per_image`, and a range of t."""

    title: str
    key: str
    times: str = "all t"


_FLOW, _ALIGNMENT = "flow", "corr"
_COLUMNS = (
    _Column(_FLOW, "flow"),
    _Column("flow markov", "flow_markov"),
    _Column("flow top 5th", "flow, most salient 5th"),
    _Column("flow 4th", "flow, 4th fifth"),
    _Column("flow 3rd", "flow, 3rd fifth"),
    _Column("flow 2nd", "flow, 2nd fifth"),
    _Column("flow low 5th", "flow, least salient 5th"),
    _Column(_ALIGNMENT, "saliency"),
    _Column("corr t > 0.65", "saliency", "t > 0.65"),
    _Column("experts", "experts"),
)
_LEGEND = (
    "flow: held-out flow loss, on rollouts with one noise per image; flow markov: with the noise of a Markov chain; "
    "top, 4th, ..., low 5th: of the tokens by saliency M. corr: Spearman's correlation of experts per token with M. "
    "experts: per token and MoE layer."
)
_METHOD = (
    "Differences are of pairs: the same seed (data order, noise of training and of samples), and for figures of single "
    "images the same held-out image and noise. Intervals (95 %): seeds and images as crossed random effects, variance "
    "var(means of seeds)/S + var(means of images)/I, Student's t with Satterthwaite's degrees of freedom; for figures "
    "of a whole set of samples (fd, kid, ...) Student's t over seeds. They are not corrected for the number of "
    "comparisons. Bold: the interval excludes 0."
)

_Values = dict[str, dict[int, list[float]]]  # figure -> seed -> values of images, or one value


class StudyTable(NamedTuple):
    """Figures of a study by arm and name."""

    means: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]  # to the control, over seeds that both have
    seeds: dict[str, tuple[int, ...]]


def make_table(study: Study, split: str) -> StudyTable:
    """Read what is measured on a split, "tuning" or "final"; arms without a measured seed are left out."""
    values = {arm.name: _values_of(study, arm, split) for arm in study.arms}
    values = {name: found for name, found in values.items() if found}
    control = values.get(study.control, {})
    return StudyTable(
        means={
            arm: {name: interval_of(list(rows.values())) for name, rows in found.items()}
            for arm, found in values.items()
        },
        differences={
            arm: {name: _difference(rows, control[name]) for name, rows in found.items() if name in control}
            for arm, found in values.items()
            if arm != study.control
        },
        seeds={arm: tuple(next(iter(found.values()))) for arm, found in values.items()},
    )


def write_table(study: Study, split: str) -> Path | None:
    """Write what is measured as SPLIT with .md, .json and .png into the folder of the study; return the first.

    None where nothing is measured yet.
    """
    table = make_table(study, split)
    if not table.means:
        return None
    path = study.folder / f"{split}.md"
    write_atomically(path, table_text(study, split, table))
    write_atomically(path.with_suffix(".json"), json.dumps(_plain(study, split, table), indent=1) + "\n")
    save_png(draw_curves(study, table), path.with_suffix(".png"))
    return path


def table_text(study: Study, split: str, table: StudyTable) -> str:
    """Return a table as Markdown."""
    names = list(dict.fromkeys(name for found in table.means.values() for name in found))
    about = [f"* `{arm.name}`: {arm.about}" for arm in study.arms if arm.about and arm.name in table.means]
    place = getattr(study.evaluate, split)
    head = [
        f"# {study.name}, {split} split ({place})",
        "",
        f"{study.trained_images} noisy images trained per arm and seed; {study.evaluate.images} held-out images; "
        f"{study.evaluate.samples} samples per seed; {study.evaluate.weights} weights; control: `{study.control}`.",
        "",
    ]
    means = [
        [f"`{arm}`", str(len(table.seeds[arm])), *(_mean(found.get(name)) for name in names)]
        for arm, found in table.means.items()
    ]
    differences = [
        [
            f"`{arm}`",
            str(max((i.seeds for i in found.values()), default=0)),
            *(_change(found.get(name)) for name in names),
        ]
        for arm, found in table.differences.items()
    ]
    lines = [*head, "## Means", "", *_markdown(["arm", "seeds", *names], means), ""]
    if differences:
        lines += [
            f"## Difference to `{study.control}`, paired",
            "",
            *_markdown(["arm", "seeds", *names], differences),
            "",
        ]
    return "\n".join([*lines, *about, *([""] if about else []), _LEGEND, "", _METHOD, ""])


def draw_curves(study: Study, table: StudyTable) -> Pixels:
    """Plot flow loss, and the Frechet distance where there is one, against alignment; bars are the intervals."""
    distances = [name for name in _names(table) if name.startswith(("fd,", "fid,"))]
    shown = [_FLOW, *distances]
    figure = Figure(figsize=(5.2 * len(shown), 4.4), dpi=110, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_plane(axis, study, table, name)
    return render_figure(figure)


def _draw_plane(axis: Axes, study: Study, table: StudyTable, name: str) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in study.arms:
        x, y = (table.means.get(arm.name, {}).get(key) for key in (_ALIGNMENT, name))
        if x is None or y is None or math.isnan(x.mean) or math.isnan(y.mean):
            continue
        lines.setdefault(arm.line or "", []).append((x.mean, y.mean))
        marker = "D" if arm.name == study.control else "o"
        axis.errorbar(
            x.mean, y.mean, xerr=_bars(x), yerr=_bars(y), marker=marker, markersize=5, capsize=2, label=arm.name
        )
    for line, points in lines.items():
        if line:
            axis.plot(*zip(*points, strict=True), color="#999999", linewidth=0.9, zorder=0)
    axis.set(xlabel="Spearman of experts per token with M, all t", ylabel="flow loss" if name == _FLOW else name)
    axis.set(title=f"{'flow loss' if name == _FLOW else name} against alignment")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False, fontsize=7)


def _bars(value: Interval) -> list[list[float]] | None:
    return None if math.isnan(value.low) else [[value.mean - value.low], [value.high - value.mean]]


def _names(table: StudyTable) -> list[str]:
    return list(dict.fromkeys(name for found in table.means.values() for name in found))


def _values_of(study: Study, arm: Arm, split: str) -> _Values:
    values: _Values = {}
    for part in study.parts:
        measured = read_measured(study, part, split) if part.arm == arm else None
        if measured is None:
            continue
        allocation, figures = measured
        for column in _COLUMNS:
            if row := _row(allocation, column):
                values.setdefault(column.title, {})[part.seed] = row
        for name, value in figures.items():
            values.setdefault(name, {})[part.seed] = [value]
    return values


def _row(allocation: Allocation, column: _Column) -> list[float]:
    return list(allocation.per_image.get(column.key, {}).get(column.times, ()))


def _difference(rows: Mapping[int, Sequence[float]], control: Mapping[int, Sequence[float]]) -> Interval:
    seeds = [seed for seed in rows if seed in control]
    pairs = [[a - b for a, b in zip(rows[seed], control[seed], strict=True)] for seed in seeds]
    return interval_of(pairs)


def _mean(value: Interval | None) -> str:
    return "" if value is None or math.isnan(value.mean) else f"{value.mean:.4f}"


def _change(value: Interval | None) -> str:
    if value is None or math.isnan(value.mean):
        return ""
    if math.isnan(value.low):
        return f"{value.mean:+.4f}"
    text = f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
    return f"**{text}**" if value.excludes_zero else text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _plain(study: Study, split: str, table: StudyTable) -> dict[str, Any]:
    def ranges(found: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
        return {
            arm: {name: {k: None if v != v else v for k, v in one._asdict().items()} for name, one in each.items()}
            for arm, each in found.items()
        }

    return {
        "study": study.name,
        "split": getattr(study.evaluate, split),
        "control": study.control,
        "trained_images": study.trained_images,
        "evaluate": study.evaluate.model_dump(mode="json"),
        "seeds": {arm: list(seeds) for arm, seeds in table.seeds.items()},
        "means": ranges(table.means),
        "differences": ranges(table.differences),
        "method": _METHOD,
    }
