"""What a table says, in sentences made from its intervals: which arms are better or worse than the control."""

from __future__ import annotations

import math

from sharpmoe.evaluation.statistics import Interval
from sharpmoe.study.plan import Study
from sharpmoe.study.table import HIGHER_IS_BETTER, StudyTable, figure_kind, judged_figures

_OF_SAMPLES = ("fd", "fid")  # the figure of the first sentence, where it is measured


def verdict_lines(study: Study, split: str, table: StudyTable) -> list[str]:
    """Return one sentence per judged figure; the first is of a Frechet distance, or of the flow loss without samples.

    An arm improves or worsens a figure where the 95 % interval of its paired difference excludes 0.
    """
    judged = judged_figures(table)
    leading = [name for name in judged if figure_kind(name) in _OF_SAMPLES][:1]
    order = leading + [name for name in judged if name not in leading]
    where = f"On the {split} split ({getattr(study.evaluate, split)}), after {study.trained_images} noisy images"
    sentences = [_sentence(study, table, name) for name in order]
    if not sentences:
        return [f"{where}: no figure is measured that could be compared."]
    return [f"{where}, {sentences[0]}", *(text[0].upper() + text[1:] for text in sentences[1:])]


def _sentence(study: Study, table: StudyTable, name: str) -> str:
    """Return what the differences of one figure say of all arms."""
    known = {arm: found[name] for arm, found in table.differences.items() if name in found}
    told = {arm: value for arm, value in known.items() if not math.isnan(value.low)}
    sign = -1 if figure_kind(name) in HIGHER_IS_BETTER else 1
    better = {arm: value for arm, value in told.items() if value.excludes_zero and sign * value.mean < 0}
    worse = {arm: value for arm, value in told.items() if value.excludes_zero and sign * value.mean > 0}
    if not told:
        return f"whether an arm improves {name} over `{study.control}` cannot be told: it takes two seeds of both."
    seeds = sorted({value.seeds for value in told.values()})
    counted = f"arms compared: {len(told)}, seeds: {' to '.join(dict.fromkeys([str(seeds[0]), str(seeds[-1])]))}"
    gain = f"{_listed(better)} improve{'s' * (len(better) == 1)}" if better else "no arm improves"
    parts = [f"{gain} {name} over `{study.control}` ({counted})"]
    widest = max((value.high - value.low) / 2 for value in told.values())
    parts.append(f"worse: {_listed(worse)}" if worse else f"none is measurably worse (intervals up to ±{widest:.2g})")
    same = [arm for arm in told if arm not in better and arm not in worse]
    if same and (better or worse):
        parts.append(f"not told apart from it: {', '.join(f'`{arm}`' for arm in same)}")
    if untold := [arm for arm in known if arm not in told]:
        parts.append(f"one seed only: {', '.join(f'`{arm}`' for arm in untold)}")
    return "; ".join(parts) + "."


def _listed(found: dict[str, Interval]) -> str:
    return ", ".join(
        f"`{arm}` ({value.mean:+.3g} [{value.low:+.3g}, {value.high:+.3g}])" for arm, value in found.items()
    )
