"""What is said to have changed between two starts of a run."""

from pathlib import Path

from sharpmoe.train.provenance import _commit, _versions, changes, changes_text, settings
from tests.train.setting import ALONE, make_run


def test_a_changed_key_an_added_one_and_a_version_are_listed(tmp_path: Path) -> None:
    before = settings(make_run(tmp_path, tmp_path), {"zero_optimization": {"stage": 3}}, ALONE)
    run = make_run(tmp_path, tmp_path, train={"steps": 9}, checkpoint={"resume": "auto"}, sample={"captions": ["a"]})
    now = settings(run, {"zero_optimization": {"stage": 3, "overlap_comm": True}}, ALONE._replace(size=2))
    now["version.torch"] = "9.9"
    assert changes(before, now) == {
        "train.steps": (4, 9),
        "sample.captions": ([], ["a"]),
        "zero.zero_optimization.overlap_comm": (None, True),
        "version.torch": (before["version.torch"], "9.9"),
        "world": (1, 2),
    }
    assert changes_text({"train.steps": (4, 9), "world": (1, 2)}) == "changed: train.steps 4 -> 9, world 1 -> 2"
    assert changes_text(changes(now, now)) == "nothing changed in configuration and versions"


def test_settings_are_json_values_by_dotted_key(tmp_path: Path) -> None:
    found = settings(make_run(tmp_path, tmp_path), {}, ALONE)
    assert found["optim.lr"] == 0.01
    assert found["optim.betas"] == [0.9, 0.999]
    assert not any(isinstance(value, dict) and value for value in found.values())


def test_versions_name_the_commit_where_there_is_one(tmp_path: Path) -> None:
    assert _versions()["python"].startswith("3.")
    assert _commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    assert _commit(tmp_path) == ""  # git finds nothing there
