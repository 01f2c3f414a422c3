"""Figures of arms, and what is missing."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from sharpmoe.evaluation.statistics import interval_of
from sharpmoe.study import table
from sharpmoe.study.measure import measure_part
from sharpmoe.study.plan import Study, load_study
from sharpmoe.study.table import judged_figures, make_table
from tests.study.toy import Figures, make_study, pretend_trained


def test_differences_are_of_pairs(tmp_path: Path, figures: dict[str, Figures]) -> None:
    found = make_table(load_study(make_study(tmp_path)), "tuning")
    assert found.means["plain"]["flow"].mean == pytest.approx(1.75)
    assert found.differences.keys() == {"steered"}
    difference = found.differences["steered"]["flow"]
    assert difference == pytest.approx(interval_of([[0.1, 0.3], [0.2, -0.2]]))
    assert found.differences["steered"]["fd, cfg 1"].mean == pytest.approx(0.95)


def test_the_interval_over_seeds_leaves_out_how_images_differ(tmp_path: Path, figures: dict[str, Figures]) -> None:
    found = make_table(load_study(make_study(tmp_path)), "tuning")
    assert found.by_seed["plain"]["flow"] == {0: 1.5, 1: 2.0}
    assert found.over_seeds["plain"]["flow"] == pytest.approx(interval_of([[1.5], [2.0]]))


def test_seeds_that_only_one_arm_has_are_not_compared(tmp_path: Path, figures: dict[str, Figures]) -> None:
    del figures["plain"]["flow"][1]
    found = make_table(load_study(make_study(tmp_path)), "tuning").differences["steered"]["flow"]
    assert (found.seeds, found.mean) == (1, pytest.approx(0.2))
    assert math.isnan(found.low)


def test_losses_and_figures_of_samples_are_judged(tmp_path: Path, figures: dict[str, Figures]) -> None:
    assert judged_figures(make_table(load_study(make_study(tmp_path)), "tuning")) == ["flow", "fd, cfg 1"]


def test_measured_parts_fill_every_column(tmp_path: Path) -> None:
    """Of a study without samples, and of arms that are not all measured."""
    study: Study = load_study(make_study(tmp_path))
    study = replace(study, evaluate=study.evaluate.model_copy(update={"samples": 0}))
    pretend_trained(study)
    for part in study.parts[:3]:
        measure_part(study, part, "final", "cpu")
    found = make_table(study, "final")
    assert found.seeds == {"plain": (0, 1), "steered": (0,)}
    assert found.missing == {"steered": (1,)}
    assert list(found.means["plain"]) == [column.title for column in table._COLUMNS]
    assert set(found.means["steered"]) - set(found.means["plain"]) == {"spread", "flipped"}
