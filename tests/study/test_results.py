"""Files that a study writes: tables, verdict, curves, sheets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sharpmoe.study.measure import measure_part, prepare_judging
from sharpmoe.study.plan import Study, load_study
from sharpmoe.study.results import write_results
from tests.study.toy import Figures, make_study, pretend_trained


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of which three of four parts are measured."""
    study = load_study(make_study(tmp_path_factory.mktemp("study")))
    pretend_trained(study)
    prepare_judging(study, "tuning", "cpu")
    for part in study.parts[:3]:
        measure_part(study, part, "tuning", "cpu")
    return study


def test_bold_is_what_excludes_zero(tmp_path: Path, figures: dict[str, Figures]) -> None:
    study = load_study(make_study(tmp_path))
    figures["steered"]["fd, cfg 1"] = {0: [4.0], 1: [4.501]}
    path = write_results(study, "tuning")
    assert path is not None
    text = path.read_text()
    assert "| `steered` | 2 | +0.1000 [" in text
    assert "**+1.0005 [+0.9941, +1.0069]**" in text
    assert "* `steered`: with both" in text
    assert "Unfinished" not in text
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["differences"]["steered"]["fd, cfg 1"]["mean"] == pytest.approx(1.0005)
    assert content["verdict"][0] in text


def test_small_figures_keep_their_digits(tmp_path: Path, figures: dict[str, Figures]) -> None:
    for arm in figures.values():
        arm["kid, cfg 1"] = {0: [0.01], 1: [0.010002]}
    path = write_results(load_study(make_study(tmp_path)), "tuning")
    assert path is not None
    assert "| 0.010001 |" in path.read_text()


def test_a_study_without_figures_has_no_results(tmp_path: Path) -> None:
    assert write_results(load_study(make_study(tmp_path)), "final") is None


def test_an_unfinished_study_says_what_is_missing_and_how_it_was_judged(measured: Study) -> None:
    path = write_results(measured, "tuning")
    assert path is not None
    text = path.read_text()
    assert "Unfinished: 3 of 4 parts are measured; missing: `steered` (seeds 1)." in text
    assert "cannot be told: it takes two seeds of both" in text
    assert "split unseen:1/2" in text
    assert "48 noisy images per arm and seed" in text
    assert "FD, classifier, 8 images; reference images reference-tuning.npz, sha256 " in text
    assert "NOTE" not in text


def test_figures_under_other_settings_are_missing(measured: Study) -> None:
    more = replace(measured, evaluate=measured.evaluate.model_copy(update={"samples": 12}))
    assert write_results(more, "tuning") is None
