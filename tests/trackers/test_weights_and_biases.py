"""Weights & Biases, offline: one run in several parts, and no process that outlives the run."""

from functools import partial
from pathlib import Path

import pytest

from tests.trackers.readers import read_wandb
from tests.trackers.setting import check_resumed, write_in_processes


@pytest.mark.slow
def test_a_resumed_run_is_one_run_without_doubled_steps_and_leaves_no_process(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    write_parts = partial(write_in_processes, tmp_path, "wandb")
    check_resumed(tmp_path, "wandb", lambda run_id: read_wandb(tmp_path / "runs" / "mine"), write_parts)
    running = [place for place in Path("/proc").glob("[0-9]*/environ") if _holds(place, f"{tmp_path}/trackio")]
    assert running == []


def _holds(environ: Path, text: str) -> bool:
    try:
        return text.encode() in environ.read_bytes()
    except OSError:
        return False
