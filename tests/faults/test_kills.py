"""A killed run goes on as if nothing had happened. Four kills; docs/reliability.md has the command of twenty."""

from pathlib import Path

import pytest

from tests.faults import kills


@pytest.mark.sweep
@pytest.mark.dist
def test_killed_runs_go_on_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    tally = kills.campaign(tmp_path, kills.killed_run(shards, tmp_path), ranks=2, kills=4, seed=1)
    assert tally.failed_restarts == []
    assert tally.differing == []
    assert tally.unsound == []
    assert len(tally.kills) == 4
    assert sum(kill.inside for kill in tally.kills) >= 2
