"""Trackers, each with its real package in its offline mode: what they hold after a run that died and was resumed."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sharpmoe.config import LogConfig
from sharpmoe.errors import ConfigError
from sharpmoe.trackers import registry
from sharpmoe.trackers.record import Table
from sharpmoe.train.runlog import RunLog
from tests.trackers.readers import Found, read_mlflow, read_trackio, read_wandb

READERS: dict[str, Callable[[Path, str], Found]] = {
    "wandb": lambda place, run_id: read_wandb(place / "runs" / "mine"),
    "trackio": lambda place, run_id: read_trackio(place / "trackio", run_id),
    "mlflow": lambda place, run_id: read_mlflow(place / "runs" / "mlruns", run_id),
}
PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
SETTINGS = {"seed": 3, "optim.lr": 0.5, "data.shards": "data/mine", "train.trainable": [], "checkpoint.init": None}

# A run in a process of its own, as trackers keep state of the process and end it with atexit.
PROCESS = """
import io, sys
from tests.trackers.test_registry import write
print(write(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])))
"""


def write(place: str, trackers: list[str], first_step: int, last_step: int) -> str:
    """Log steps first to last of a run of nine, validation and pictures each third; return what was said."""
    stream = io.StringIO()
    log = RunLog(
        Path(place) / "runs" / "mine", 9, first_step, every=1, stream=stream, settings=SETTINGS, trackers=trackers
    )
    for step in range(first_step, last_step + 1):
        log.scalars(step, {"loss/total": 1 / step, "saliency_flipped_t > 0.65/layer_1": 0.5, "bad": float("nan")})
        if step % 3 == 0:
            log.scalars(step, {"validation/flow": 1 / step})
            log.image(step, "samples", PICTURE)
    if last_step == 9:
        log.table(9, "allocation", Table(("figure", "before", "after"), (("a", 1.0, 2.0), ("b", None, 3.0)), "a 1 2"))
        log.warn(9, "be <careful>")
    log.close()
    return stream.getvalue()


def in_a_process(place: Path, tracker: str, first_step: int, last_step: int) -> str:
    local = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(place / "trackio"), "MLFLOW_TRACKING_URI": ""}
    environment = os.environ | local | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", PROCESS, str(place), tracker, str(first_step), str(last_step)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_is_resumed_is_one_run_without_doubled_steps(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    said = in_a_process(tmp_path, tracker, 1, 5)  # saved after step 3, and died after step 5
    ids = registry.read_ids(tmp_path / "runs" / "mine")
    said += in_a_process(tmp_path, tracker, 4, 9)
    assert registry.read_ids(tmp_path / "runs" / "mine") == ids
    assert "note" not in said
    found = READERS[tracker](tmp_path, ids[tracker])
    by_tag = {tag.replace("_ 0.65", "> 0.65"): steps for tag, steps in found.figures.items()}
    assert by_tag["loss/total"] == list(range(1, 10))
    assert by_tag["saliency_flipped_t > 0.65/layer_1"] == list(range(1, 10))
    assert by_tag["validation/flow"] == [3, 6, 9]
    assert "bad" not in by_tag
    assert {"samples", "allocation", "warnings"} <= found.media
    assert str(found.settings["seed"]) == "3"
    assert found.settings["data.shards"] == "data/mine"
    assert str(tmp_path) not in found.text.replace(str(tmp_path / "runs" / "mlruns"), "")
    assert socket.gethostname() not in found.text


@pytest.mark.slow
def test_wandb_leaves_no_process(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    in_a_process(tmp_path, "wandb", 1, 1)
    running = [place for place in Path("/proc").glob("[0-9]*/environ") if _holds(place, f"{tmp_path}/trackio")]
    assert running == []


def _holds(environ: Path, text: str) -> bool:
    try:
        return text.encode() in environ.read_bytes()
    except OSError:
        return False


def test_a_run_that_begins_again_is_another_one(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    write(str(tmp_path), ["mlflow"], 1, 3)
    first = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    write(str(tmp_path), ["mlflow"], 1, 2)
    second = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    assert first != second
    write(str(tmp_path), ["mlflow"], 3, 3)  # resumes the second, which had not done it; only the first had
    assert registry.read_ids(tmp_path / "runs" / "mine")["mlflow"] == second
    assert read_mlflow(tmp_path / "runs" / "mlruns", second).figures["loss/total"] == [1, 2, 3]


def test_a_tracker_that_cannot_be_opened_is_one_note_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "file").as_uri())
    said = write(str(tmp_path), ["mlflow"], 1, 9)
    assert said.count("note: log.trackers: mlflow: figures cannot be written") == 1
    lines = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "log.jsonl").read_text().splitlines()]
    assert sum("loss/total" in line for line in lines) == 9


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    registry.check_trackers(["tensorboard"])
    for name, kind in registry.MIRRORS.items():
        with pytest.raises(ConfigError) as caught:
            registry.check_trackers(["tensorboard", name])
        assert str(caught.value) == (
            f"log.trackers: {name} is not installed; install the extra: pip install 'sharpmoe[trackers]' "
            f"(or pip install {kind.distribution}), or remove it from log.trackers"
        )


def test_the_configuration_names_the_trackers_of_the_table() -> None:
    (names, _) = get_args(LogConfig.model_fields["trackers"].annotation)
    assert set(get_args(names)) == {"tensorboard", *registry.MIRRORS}


def test_urls_in_the_configuration_lose_their_credentials(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    stream = io.StringIO()
    settings = {"checkpoint.init": "https://me:secret@host/base"}
    RunLog(tmp_path / "runs" / "mine", 1, stream=stream, settings=settings, trackers=["mlflow"]).close()
    run_id = registry.read_ids(tmp_path / "runs" / "mine")["mlflow"]
    found = read_mlflow(tmp_path / "runs" / "mlruns", run_id)
    assert "host/base" in found.settings["checkpoint.init"]
    assert "secret" not in found.text
