"""Trackio, in a database on this machine."""

from functools import partial
from pathlib import Path

import pytest

from tests.trackers.readers import read_trackio
from tests.trackers.setting import check_resumed, write_in_processes


@pytest.mark.slow
def test_a_resumed_run_is_one_run_without_doubled_steps(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    write_parts = partial(write_in_processes, tmp_path, "trackio")
    check_resumed(tmp_path, "trackio", partial(read_trackio, tmp_path / "trackio"), write_parts)
