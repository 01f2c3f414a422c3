"""Rehearsal, definitions of parts, and the order of jobs; whole studies are in tests/launcher/test_ablate.py."""

import fcntl
from pathlib import Path

import pytest

from sharpmoe.errors import ConfigError, DataError
from sharpmoe.study.conduct import Wish, _define, _jobs, conduct, rehearse_study
from sharpmoe.study.plan import load_study
from tests.study.toy import make_study, pretend_trained


def test_a_rehearsal_lists_what_is_left_and_writes_nothing(tmp_path: Path) -> None:
    path = make_study(tmp_path)
    said = rehearse_study(load_study(path), Wish(), "cpu").splitlines()
    assert said[0].startswith("toy: 4 parts, 9 jobs, 9 left; folder ")
    assert said[1:4] == ["  prepare judging on tuning", "  train plain/seed0", "  measure plain/seed0 on tuning"]
    assert "of training" in said[-2]
    assert said[-1] == "ok"
    assert not (tmp_path / "studies").exists()


def test_a_rehearsal_names_the_arm_that_cannot_start(tmp_path: Path) -> None:
    arms = [{"name": "a", "overrides": {"optim": {"lr_scale": {"nothing": 2}}}}]
    with pytest.raises(ConfigError, match="arm a: optim.lr_scale: 'nothing' matches no parameter"):
        rehearse_study(load_study(make_study(tmp_path, control="a", arms=arms)), Wish(), "cpu")


def test_a_rehearsal_names_the_arm_that_lacks_its_shards(tmp_path: Path) -> None:
    place = tmp_path / "none"
    arms = [{"name": "a"}, {"name": "b", "overrides": {"data": {"shards": str(place)}}}]
    with pytest.raises(DataError, match=f"^arm b: {place}"):
        rehearse_study(load_study(make_study(tmp_path, control="a", arms=arms)), Wish(), "cpu")


def test_what_is_trained_is_left_out(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    pretend_trained(study)
    jobs = _jobs(study, study.only(["steered"]), Wish())
    assert [(job.name, job.is_done()) for job in jobs] == [
        ("prepare judging on tuning", False),
        ("train steered/seed0", True),
        ("measure steered/seed0 on tuning", False),
        ("train steered/seed1", True),
        ("measure steered/seed1 on tuning", False),
    ]


def test_a_changed_arm_is_refused(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    for part in study.parts:
        _define(part)
        _define(part)  # the same again is accepted
    changed = load_study(tmp_path / "study.yaml", ["--optim.lr", "0.5"])
    with pytest.raises(ConfigError, match=r"arm plain was begun with optim\.lr 0\.01, the study has 0\.5"):
        conduct(changed, Wish(), print)
    base = tmp_path / "base.safetensors"
    base.write_bytes(base.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="arm plain was begun with the content of "):
        conduct(study, Wish(), print)


def test_one_process_conducts_a_study(tmp_path: Path) -> None:
    study = load_study(make_study(tmp_path))
    study.folder.mkdir(parents=True)
    with (study.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process conducts this study"):
            conduct(study, Wish(), print)
