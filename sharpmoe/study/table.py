"""The figures of a study by arm: means, paired differences to the control with intervals, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sharpmoe.evaluation.allocation import Allocation
from sharpmoe.evaluation.statistics import Interval, interval_of
from sharpmoe.study.measure import read_measured
from sharpmoe.study.plan import Arm, Study


class _Column(NamedTuple):
    """A figure that every image has: a key of `Allocation.per_image`, and a range of t."""

    title: str
    key: str
    times: str = "all t"


FLOW, FLOW_MARKOV, ALIGNMENT, ALIGNMENT_NOISE = "flow", "flow markov", "corr", "corr t > 0.65"
_COLUMNS = (
    _Column(FLOW, "flow"),
    _Column(FLOW_MARKOV, "flow_markov"),
    _Column("flow top 5th", "flow, most salient 5th"),
    _Column("flow 4th", "flow, 4th fifth"),
    _Column("flow 3rd", "flow, 3rd fifth"),
    _Column("flow 2nd", "flow, 2nd fifth"),
    _Column("flow low 5th", "flow, least salient 5th"),
    _Column(ALIGNMENT, "saliency"),
    _Column(ALIGNMENT_NOISE, "saliency", "t > 0.65"),
    _Column("corr t 0.35-0.65", "saliency", "t 0.35-0.65"),
    _Column("corr t < 0.35", "saliency", "t < 0.35"),
    _Column("experts", "experts"),
)
_STRENGTH = ("spread", "flipped")  # of `Allocation.strength`: one value per seed, of models with saliency routers
LOWER_IS_BETTER = ("flow", "fd", "fid", "sfid", "kid", "cmmd")  # how the names of such figures begin
HIGHER_IS_BETTER = ("accuracy", "precision", "recall", "is")

_Values = dict[str, dict[int, list[float]]]  # figure -> seed -> values of images, or one value


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """Figures of a study by arm and name; arms of which nothing is measured are left out."""

    means: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]  # to the control, over seeds that both have
    over_seeds: dict[str, dict[str, Interval]]  # means whose interval is over seeds alone, for the same images
    by_seed: dict[str, dict[str, dict[int, float]]]  # mean of each seed
    seeds: dict[str, tuple[int, ...]]
    missing: dict[str, tuple[int, ...]]  # arm -> seeds that are not measured as the study says

    @property
    def names(self) -> list[str]:
        """Names of all figures, in the order of the table."""
        return list(dict.fromkeys(name for found in self.means.values() for name in found))


def make_table(study: Study, split: str) -> StudyTable:
    """Read what is measured on a split, "tuning" or "final"; seeds that are not are listed as missing."""
    everything = {arm.name: _values_of(study, arm, split) for arm in study.arms}
    values = {name: found for name, found in everything.items() if found}
    control = values.get(study.control, {})
    seeds = {arm: tuple(next(iter(found.values()))) for arm, found in values.items()}
    by_seed = {
        arm: {name: {seed: interval_of([row]).mean for seed, row in rows.items()} for name, rows in found.items()}
        for arm, found in values.items()
    }
    missing = {arm.name: tuple(s for s in study.seeds if s not in seeds.get(arm.name, ())) for arm in study.arms}
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
        over_seeds={
            arm: {name: interval_of([[value] for value in rows.values()]) for name, rows in found.items()}
            for arm, found in by_seed.items()
        },
        by_seed=by_seed,
        seeds=seeds,
        missing={arm: left for arm, left in missing.items() if left},
    )


def figure_kind(name: str) -> str:
    """Return which figure a name is of: "fd" for "fd, cfg 1.5"."""
    return name.partition(",")[0]


def judged_figures(table: StudyTable) -> list[str]:
    """Return the names of the figures that say whether an arm is good: losses, and those of samples."""
    of_samples = [name for name in table.names if figure_kind(name) in (*LOWER_IS_BETTER[1:], *HIGHER_IS_BETTER)]
    return [name for name in (FLOW, FLOW_MARKOV) if name in table.names] + of_samples


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
        strength = allocation.strength.get("all", {}).get("all t", {})
        of_sets = {name: strength[name] for name in _STRENGTH if name in strength}
        for name, value in (of_sets | figures).items():
            values.setdefault(name, {})[part.seed] = [value]
    return values


def _row(allocation: Allocation, column: _Column) -> list[float]:
    return list(allocation.per_image.get(column.key, {}).get(column.times, ()))


def _difference(rows: Mapping[int, Sequence[float]], control: Mapping[int, Sequence[float]]) -> Interval:
    seeds = [seed for seed in rows if seed in control]
    return interval_of([[a - b for a, b in zip(rows[seed], control[seed], strict=True)] for seed in seeds])
