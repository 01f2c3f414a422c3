"""Room on the disk for the checkpoints of a run: what a start and a dry run ask for."""

from pathlib import Path

import pytest

from sharpmoe.checkpoint import retention
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.planning.disk import CheckpointSpace, check_first_checkpoint, most_checkpoints
from sharpmoe.planning.rehearsal import Target, rehearse
from tests.fixtures_data import make_shards
from tests.train.setting import ALONE, make_run, plan_for


def test_a_start_needs_room_for_one_checkpoint_and_says_where_more_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(make_shards(tmp_path / "shards"), tmp_path / "runs", train={"steps": 2}, checkpoint={"every": 1})
    plan = plan_for(run, ALONE)
    assert check_first_checkpoint(plan) == ()
    room = int(1.5 * CheckpointSpace.of(plan).size)
    monkeypatch.setattr(retention, "free_bytes", lambda root: room)
    monkeypatch.setattr(Checkpoints, "free_bytes", staticmethod(retention.free_bytes))
    with pytest.raises(CheckpointError, match="and 2 are still to come"):
        rehearse(run, plan.ds_config, ALONE, Target(1, None, True))
    (note,) = check_first_checkpoint(plan)
    assert "at most 2 at a time" in note
    assert note.endswith("lower checkpoint.keep, or free space before they are written")


def test_how_many_checkpoints_are_there_together() -> None:
    def most(done: int = 0, **checkpoint: int) -> int:
        return most_checkpoints(RunConfig.model_validate({"train": {"steps": 100}, "checkpoint": checkpoint}), done)

    assert most(every=0) == 1  # at the end
    assert most(every=1000) == 1
    assert most(every=50) == 2
    assert most(every=10, keep=2) == 3
    assert most(every=10, keep=2, keep_every=50) == 5
    assert most(60, every=10, keep=2, keep_every=50) == 4
    assert most(95, every=10) == 1
    assert most(every=10, keep=2, keep_best=1) == 4
