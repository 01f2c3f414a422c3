"""MLflow, in its store of files. Its client keeps nothing of the process: the runs are written in that of the tests."""

import io
import json
from functools import partial
from pathlib import Path

import pytest

from sharpmoe.trackers import registry
from sharpmoe.train.runlog import RunLog
from tests.trackers.readers import read_mlflow
from tests.trackers.setting import check_resumed, write

pytestmark = pytest.mark.slow  # its import takes seconds


@pytest.fixture(autouse=True)
def local_store(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_resumed_run_is_one_run_without_doubled_steps(tmp_path: Path) -> None:
    def write_parts(*parts: str) -> str:
        return "".join(write(str(tmp_path), ["mlflow"], *map(int, part.split("-"))) for part in parts)

    check_resumed(tmp_path, "mlflow", partial(read_mlflow, tmp_path / "runs" / "mlruns"), write_parts)


def test_a_run_that_begins_again_is_another_one(tmp_path: Path) -> None:
    write(str(tmp_path), ["mlflow"], 1, 3)
    first = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    write(str(tmp_path), ["mlflow"], 1, 2)
    second = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    assert first != second
    write(str(tmp_path), ["mlflow"], 3, 3)  # resumes the second, which had not done it; only the first had
    assert registry.read_ids(tmp_path / "runs" / "mine")["mlflow"] == second
    assert read_mlflow(tmp_path / "runs" / "mlruns", second).figures["loss/total"] == [1, 2, 3]


def test_a_store_that_cannot_be_opened_is_one_note_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "file").as_uri())
    said = write(str(tmp_path), ["mlflow"], 1, 9)
    assert said.count("note: log.trackers: mlflow: figures cannot be written") == 1
    lines = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "log.jsonl").read_text().splitlines()]
    assert sum("loss/total" in line for line in lines) == 9


def test_urls_in_the_configuration_lose_their_credentials(tmp_path: Path) -> None:
    stream = io.StringIO()
    settings = {"checkpoint.init": "https://me:secret@host/base"}
    RunLog(tmp_path / "runs" / "mine", 1, stream=stream, settings=settings, trackers=["mlflow"]).close()
    run_id = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    found = read_mlflow(tmp_path / "runs" / "mlruns", run_id)
    assert "host/base" in found.settings["checkpoint.init"]
    assert "secret" not in found.text
