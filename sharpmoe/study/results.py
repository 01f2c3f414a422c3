"""The results of a study as files, of what is measured so far: verdict, tables with intervals, curves and sheets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpmoe.durable import write_atomically
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES
from sharpmoe.evaluation.statistics import Interval, plain_interval
from sharpmoe.report.figures import save_png
from sharpmoe.study.curves import curve_points, draw_curves
from sharpmoe.study.measure import read_protocols
from sharpmoe.study.plan import Study
from sharpmoe.study.sheets import draw_sheets
from sharpmoe.study.table import ALIGNMENT, ALIGNMENT_NOISE, StudyTable, judged_figures, make_table
from sharpmoe.study.verdict import verdict_lines

_LEGEND = (
    "flow: held-out flow loss, on rollouts with one noise per image; flow markov: with the noise of a Markov chain; "
    "top, 4th, ..., low 5th: of the tokens by saliency M. corr: Spearman's correlation of experts per token with M. "
    "experts: per token and MoE layer. spread: of the saliency router's logits over that of the gate's; flipped: share "
    "of choices that the gate alone would not make."
)
_METHOD = (
    "Differences are of pairs: the same seed (data order, noise of training and of samples), and for figures of single "
    "images the same held-out image and noise. Intervals (95 %): seeds and images as crossed random effects, variance "
    "var(means of seeds)/S + var(means of images)/I, Student's t with Satterthwaite's degrees of freedom; for figures "
    "of a whole set of samples (fd, kid, ...) Student's paired t over seeds, each with samples of its own, so that the "
    "noise of sampling is inside. They are not corrected for the number of comparisons. Bold: the interval excludes 0."
)
_MOST = 6  # decimals


def write_results(
    study: Study, split: str, sheet_images: int = 0, say: Callable[[str], object] = lambda line: None
) -> Path | None:
    """Write what is measured as SPLIT with .md, .json and .png into the folder of the study; return the first.

    Parts that are not measured are counted and left out; none is trained or measured here, and a study that runs is not
    disturbed. sheet_images: images on the routing sheets, which load the weights of every arm; 0 draws none. None where
    nothing is measured yet.
    """
    table = make_table(study, split)
    if not table.means:
        return None
    path = study.folder / f"{split}.md"
    save_png(draw_curves(study, table), path.with_suffix(".png"))
    sheets = draw_sheets(study, split, sheet_images, say) if sheet_images else []
    write_atomically(path.with_suffix(".json"), json.dumps(_plain(study, split, table), indent=1) + "\n")
    write_atomically(path, results_text(study, split, table, [str(file.relative_to(study.folder)) for file in sheets]))
    return path


def results_text(study: Study, split: str, table: StudyTable, sheets: Sequence[str] = ()) -> str:
    """Return the results as Markdown: the verdict and a short table first, every figure below."""
    verdict, *details = verdict_lines(study, split, table)
    lines = [f"# {study.name}, {split} split ({getattr(study.evaluate, split)})", "", f"**{verdict}**", ""]
    lines += [*(f"* {line}" for line in details), "", *_unfinished(study, table)]
    lines += [*_short_table(study, table), "", f"![alignment against quality]({split}.png)", ""]
    lines += [f"![where the arms spend their experts]({sheets[0]})", ""] if sheets else []
    lines += ["Protocol:", "", *(f"* {line}" for line in protocol_lines(study, split, table)), "", _METHOD, ""]
    about = [f"* `{arm.name}`: {arm.about}" for arm in study.arms if arm.about and arm.name in table.means]
    lines += [*about, ""] if about else []
    return "\n".join([*lines, *_full_tables(study, table), _LEGEND, ""])


def protocol_lines(study: Study, split: str, table: StudyTable) -> list[str]:
    """Return under which conditions the figures of a table were made, one subject a line."""
    settings, run = study.evaluate, study.parts[0].run
    seeds = ", ".join(str(seed) for seed in study.seeds)
    lines = [
        f"split {getattr(settings, split)} of {Path(study.measured_data.first_place).name}; settings are chosen on "
        f"{settings.tuning}, reported on {settings.final}",
        f"training: {study.trained_images} noisy images per arm and seed, seeds {seeds}; {settings.weights} weights",
        f"flow and corr: {settings.images} held-out images at {len(ALLOCATION_TIMES)} times from "
        f"{ALLOCATION_TIMES[0]} to {ALLOCATION_TIMES[-1]}, {settings.chunk} per model call, noise of seed "
        f"{settings.seed}, the same for all arms",
    ]
    if not settings.samples:
        return lines
    scales = ", ".join(f"{scale:g}" for scale in settings.cfg_scales)
    lines.append(
        f"samples: {settings.samples} per part and scale, {run.sample.method}, {run.sample.num_steps} steps, guidance "
        f"{scales}, {settings.sample_batch} per model call, noise of the part's seed"
    )
    parts = [part for part in study.parts if part.seed in table.seeds.get(part.arm.name, ())]
    found = {json.dumps(kept, sort_keys=True): kept for part in parts for kept in read_protocols(study, part, split)}
    lines += [
        f"figures of samples: {kept['name']}; reference {kept['reference']}; extractor {kept['extractor']}"
        for kept in found.values()
    ]
    return [*lines, "NOTE: parts were judged under different protocols, listed above"] if len(found) > 1 else lines


def _unfinished(study: Study, table: StudyTable) -> list[str]:
    """Return a note of what is not measured yet; nothing where all is."""
    if not table.missing:
        return []
    left = sum(map(len, table.missing.values()))
    arms = [f"`{arm}` (seeds {', '.join(map(str, seeds))})" for arm, seeds in table.missing.items()]
    return [
        f"Unfinished: {len(study.parts) - left} of {len(study.parts)} parts are measured; missing: {'; '.join(arms)}. "
        "Means of arms with different seeds cannot be compared, differences are of seeds that both have.",
        "",
    ]


def _short_table(study: Study, table: StudyTable) -> list[str]:
    """Return the table that answers the question: alignment, and differences of what is judged."""
    judged = judged_figures(table)
    head = ["arm", "seeds", ALIGNMENT, ALIGNMENT_NOISE, *(f"{name}, change" for name in judged)]
    rows = []
    for arm, found in table.means.items():
        control = arm == study.control
        values = found if control else table.differences.get(arm, {})
        cell = _mean if control else _change
        rows.append(
            [
                f"`{arm}`" + (" (control: values)" if control else ""),
                str(len(table.seeds[arm])),
                *(_mean(found.get(name), 4) for name in (ALIGNMENT, ALIGNMENT_NOISE)),
                *(cell(values.get(name), _decimals(table, name)) for name in judged),
            ]
        )
    return _markdown(head, rows)


def _full_tables(study: Study, table: StudyTable) -> list[str]:
    names = table.names
    means = [
        [f"`{arm}`", str(len(table.seeds[arm])), *(_mean(found.get(name), _decimals(table, name)) for name in names)]
        for arm, found in table.means.items()
    ]
    lines = ["## Means", "", *_markdown(["arm", "seeds", *names], means), ""]
    compared = [name for name in names if any(name in found for found in table.differences.values())]
    changes = [
        [
            f"`{arm}`",
            str(max((i.seeds for i in found.values()), default=0)),
            *(_change(found.get(name), _decimals(table, name)) for name in compared),
        ]
        for arm, found in table.differences.items()
    ]
    if not changes:
        return lines
    head = ["arm", "seeds", *compared]
    return [*lines, f"## Difference to `{study.control}`, paired", "", *_markdown(head, changes), ""]


def _decimals(table: StudyTable, name: str) -> int:
    """Return the decimals of a column: five digits of its largest value, so that small differences are seen."""
    means = [abs(found[name].mean) for found in table.means.values() if name in found]
    largest = max((mean for mean in means if not math.isnan(mean)), default=0.0)
    return 4 if not 0 < largest < 1 else min(4 - math.floor(math.log10(largest)), _MOST)


def _mean(value: Interval | None, decimals: int) -> str:
    return "" if value is None or math.isnan(value.mean) else f"{value.mean:.{decimals}f}"


def _change(value: Interval | None, decimals: int) -> str:
    if value is None or math.isnan(value.mean):
        return ""
    mean = f"{value.mean:+.{decimals}f}"
    if math.isnan(value.low):
        return mean
    text = f"{mean} [{value.low:+.{decimals}f}, {value.high:+.{decimals}f}]"
    return f"**{text}**" if value.excludes_zero else text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _plain(study: Study, split: str, table: StudyTable) -> dict[str, Any]:
    def ranges(found: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
        return {arm: {name: plain_interval(one) for name, one in each.items()} for arm, each in found.items()}

    return {
        "study": study.name,
        "split": getattr(study.evaluate, split),
        "control": study.control,
        "trained_images": study.trained_images,
        "evaluate": study.evaluate.model_dump(mode="json"),
        "verdict": verdict_lines(study, split, table),
        "protocol": protocol_lines(study, split, table),
        "seeds": {arm: list(seeds) for arm, seeds in table.seeds.items()},
        "missing": {arm: list(seeds) for arm, seeds in table.missing.items()},
        "means": ranges(table.means),
        "differences": ranges(table.differences),
        "curves": curve_points(study, table),
        "method": _METHOD,
    }
