"""A study from its file to its table, with every process that it starts."""

import fcntl
import json
from pathlib import Path

import pytest

from launcher.ablate import main
from sharpmoe.study.measure import measure_part
from sharpmoe.study.plan import load_study
from tests.study.toy import make_study, pretend_trained

FILES = {*(f"tuning.{kind}" for kind in ("md", "json", "png")), "classifier.safetensors", "classifier.json"}


def test_a_dry_run_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_study(tmp_path)), "--dry-run", "--only", "steered"]) == 0
    assert "5 jobs, 5 left" in capsys.readouterr().out


def test_a_job_measures_one_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_study(tmp_path)
    study = load_study(path)
    pretend_trained(study)
    assert main([str(path), "--final", "--job", "judging"]) == 0
    assert main([str(path), "--final", "--job", "steered/seed1"]) == 0
    assert "seed1-final/figures.json" in capsys.readouterr().out
    assert main([str(path), "--job", "steered/seed7"]) == 2
    assert "no part 'steered/seed7'; there are plain/seed0" in capsys.readouterr().err


def test_a_report_alone_is_of_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While another process conducts the study."""
    path = make_study(tmp_path, evaluate={"images": 2, "chunk": 2})
    study = load_study(path)
    pretend_trained(study)
    assert main([str(path), "--report-only"]) == 2
    assert "nothing is measured on the tuning split yet" in capsys.readouterr().err
    measure_part(study, study.parts[0], "tuning", "cpu")
    with (study.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main([str(path), "--report-only", "--sheet-images", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 parts are measured" in said
    assert "starts" not in said


def test_the_limit_of_time_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_study(tmp_path)), "--time-limit", "0.001"]) == 0
    assert "jobs are left; the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.sweep
def test_a_study_from_its_file_to_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two arms x two seeds x two steps, a part at first and the rest in a second call, which repeats nothing."""
    path = make_study(tmp_path)
    assert main([str(path), "--parallel", "2", "--only", "plain"]) == 0
    folder = tmp_path / "studies" / "toy"
    log = folder / "arms" / "plain" / "seed0" / "log.jsonl"
    before = log.read_bytes()
    assert main([str(path), "--parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert log.read_bytes() == before
    assert {file.name for file in folder.iterdir() if file.is_file()} == FILES | {"reference-tuning.npz", "lock"}
    content = json.loads((folder / "tuning.json").read_text())
    assert content["seeds"] == {"plain": [0, 1], "steered": [0, 1]}
    assert content["differences"]["steered"]["flow"]["seeds"] == 2
    assert content["differences"]["steered"]["flow"]["mean"] != 0
    assert "| `steered` | 2 |" in said
    assert main([str(path)]) == 0
    assert "starts" not in capsys.readouterr().out.split("# toy")[0]
