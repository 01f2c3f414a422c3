"""Tables and curves from measured figures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sharpmoe.study import table
from sharpmoe.study.measure import measure_part
from sharpmoe.study.plan import Study, load_study
from sharpmoe.study.statistics import interval_of
from sharpmoe.study.table import make_table, write_table
from tests.study.toy import make_study, pretend_trained

Figures = dict[str, dict[int, list[float]]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figures]:
    found: dict[str, Figures] = {
        "plain": {"flow": {0: [1.0, 2.0], 1: [1.5, 2.5]}, "fd, cfg 1": {0: [3.0], 1: [3.5]}},
        "steered": {"flow": {0: [1.1, 2.3], 1: [1.7, 2.3]}, "fd, cfg 1": {0: [4.0], 1: [4.4]}},
    }
    monkeypatch.setattr(table, "_values_of", lambda study, arm, split: found[arm.name])
    return found


def test_differences_are_of_pairs(tmp_path: Path, figures: dict[str, Figures]) -> None:
    study = load_study(make_study(tmp_path))
    found = make_table(study, "tuning")
    assert found.means["plain"]["flow"].mean == pytest.approx(1.75)
    assert found.differences.keys() == {"steered"}
    difference = found.differences["steered"]["flow"]
    assert difference == pytest.approx(interval_of([[0.1, 0.3], [0.2, -0.2]]))
    assert found.differences["steered"]["fd, cfg 1"].mean == pytest.approx(0.95)


def test_seeds_that_only_one_arm_has_are_not_compared(tmp_path: Path, figures: dict[str, Figures]) -> None:
    del figures["plain"]["flow"][1]
    found = make_table(load_study(make_study(tmp_path)), "tuning").differences["steered"]["flow"]
    assert (found.seeds, found.mean) == (1, pytest.approx(0.2))
    assert math.isnan(found.low)


def test_bold_is_what_excludes_zero(tmp_path: Path, figures: dict[str, Figures]) -> None:
    study = load_study(make_study(tmp_path))
    figures["steered"]["fd, cfg 1"] = {0: [4.0], 1: [4.501]}
    path = write_table(study, "tuning")
    assert path is not None
    text = path.read_text()
    assert "| `steered` | 2 | +0.1000 [" in text
    assert "**+1.0005 [+0.9941, +1.0069]**" in text
    assert "* `steered`: with both" in text
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["differences"]["steered"]["fd, cfg 1"]["mean"] == pytest.approx(1.0005)


def test_a_study_without_figures_has_no_table(tmp_path: Path) -> None:
    assert write_table(load_study(make_study(tmp_path)), "final") is None


def test_measured_parts_fill_every_column(tmp_path: Path) -> None:
    """Of a study without samples, and of arms that are not all measured."""
    study: Study = load_study(make_study(tmp_path))
    study = replace(study, evaluate=study.evaluate.model_copy(update={"samples": 0}))
    pretend_trained(study)
    for part in study.parts[:3]:
        measure_part(study, part, "final", "cpu")
    found = make_table(study, "final")
    assert found.seeds == {"plain": (0, 1), "steered": (0,)}
    assert list(found.means["plain"]) == [column.title for column in table._COLUMNS]
    path = write_table(study, "final")
    assert path is not None
    assert Image.open(path.with_suffix(".png")).width > 300
