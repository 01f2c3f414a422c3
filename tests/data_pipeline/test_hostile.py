"""Hostile inputs: nothing in them is executed, nothing is written outside, memory stays below a cap."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.safety import CAPS
from tests.data_pipeline.hostile import PICKLE, SENTINEL, SHARDS, added, store

ROOT = Path(__file__).resolve().parents[2]
CAP_MIB = CAPS.sample / 2**20 + 64  # beyond an empty run: one sample, and something for the rest
REASONS = (
    ("pickled.jpg", "unreadable"),
    ("eps.png", "unreadable"),
    ("bomb.png", "pixels"),
    ("gz.png", "unreadable"),
    ("'../out.png'", "not a plain relative path"),
    ("'/root.png'", "not a plain relative path"),
    ("deep", "not JSON"),
    ("link.png", "a symbolic link"),
    ("link.txt", "a hard link"),
    ("device.png", "a device"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-m", "tests.data_pipeline.hostile", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


@pytest.mark.sweep
def test_nothing_is_executed_followed_or_written_outside(report: dict[str, Any]) -> None:
    assert report["seen"] == []
    assert not report["executed"]
    assert any("system" in event for event in report["control"])  # the watch is awake, and the payload works
    assert report["control_executed"]
    assert "prepared: train 4" in report["warm"]


@pytest.mark.sweep
def test_every_input_is_refused_in_one_line(report: dict[str, Any]) -> None:
    assert set(SHARDS) < set(report["results"])
    for name, result in report["results"].items():
        if name != "a tar of hostile pictures":
            assert result.startswith(("DataError: ", "DamageError: ")), (name, result)
            assert "\n" not in result, name
            assert len(result) < 700, name


@pytest.mark.sweep
def test_hostile_pictures_are_left_out_and_named(report: dict[str, Any]) -> None:
    result = report["results"]["a tar of hostile pictures"]
    lines = [line for line in result.splitlines() if "skipped " in line]
    for name, reason in REASONS:
        assert any(name in line and reason in line for line in lines), (name, reason, result)
    assert not any("good" in line for line in lines)
    assert "14 left out" in result


@pytest.mark.sweep
def test_memory_stays_below_a_cap(report: dict[str, Any]) -> None:
    """The largest input that is read at all is a sample just below its cap; without caps it would be gigabytes."""
    assert 200 < report["peak_mib"] < CAP_MIB


@pytest.mark.sweep
def test_the_same_shard_is_executed_by_webdataset(tmp_path: Path) -> None:
    """So the table above can fail: its payloads are alive."""
    folder = store(added("pyd", PICKLE), tmp_path / "shards")
    code = f"import webdataset as w; list(w.WebDataset('{folder}/train-16x16-00000.tar', shardshuffle=False).decode())"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert (tmp_path / SENTINEL).exists()
