"""Routing sheets of a study's arms."""

from pathlib import Path

from sharpmoe.study.plan import load_study
from sharpmoe.study.sheets import draw_sheets
from tests.study.toy import make_study, pretend_trained


def test_sheets_show_every_arm_and_its_difference_to_the_control(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    said: list[str] = []
    assert draw_sheets(study, "tuning", 1, said.append) == []  # nothing is trained
    pretend_trained(study)
    files = draw_sheets(study, "tuning", 1, said.append)
    assert [file.stem for file in files] == ["arms", "routing-plain", "routing-steered", "difference-steered"]
    assert all(file.parent == study.folder / "sheets-tuning" and file.is_file() for file in files)
    assert len(said) == 1
