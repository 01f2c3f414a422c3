"""Sentences that follow from the intervals of a table."""

from pathlib import Path

from sharpmoe.study.plan import load_study
from sharpmoe.study.table import make_table
from sharpmoe.study.verdict import verdict_lines
from tests.study.toy import Figures, make_study


def _verdict(root: Path, split: str = "tuning") -> list[str]:
    study = load_study(make_study(root))
    return verdict_lines(study, split, make_table(study, split))


def test_no_arm_improves(tmp_path: Path, figures: dict[str, Figures]) -> None:
    first, flow = _verdict(tmp_path, "final")
    assert first == (
        "On the final split (unseen:2/2), after 48 noisy images, no arm improves fd, cfg 1 over `plain` (arms "
        "compared: 1, seeds: 2); worse: `steered` (+0.95 [+0.315, +1.59])."
    )
    assert flow.startswith("No arm improves flow over `plain` (arms compared: 1, seeds: 2); none is measurably worse")
    assert flow.endswith("(intervals up to ±0.69).")  # as wide as the table's


def test_an_arm_that_improves_is_named_with_its_interval(tmp_path: Path, figures: dict[str, Figures]) -> None:
    figures["steered"]["fd, cfg 1"] = {0: [2.0], 1: [2.501]}
    assert "`steered` (-1 [-1.01, -0.993]) improves fd, cfg 1 over `plain`" in _verdict(tmp_path)[0]


def test_more_accuracy_is_better(tmp_path: Path, figures: dict[str, Figures]) -> None:
    for arm, value in (("plain", 0.5), ("steered", 0.7)):
        figures[arm]["accuracy, cfg 1"] = {0: [value], 1: [value + 0.001]}
    assert "`steered` (+0.2 [+0.2, +0.2]) improves accuracy, cfg 1 over `plain`" in _verdict(tmp_path)[2]


def test_one_seed_tells_nothing(tmp_path: Path, figures: dict[str, Figures]) -> None:
    for found in figures["steered"].values():
        del found[1]
    assert "whether an arm improves fd, cfg 1 over `plain` cannot be told: it takes two seeds" in _verdict(tmp_path)[0]
