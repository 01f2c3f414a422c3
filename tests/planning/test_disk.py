"""Room on the disk for the checkpoints of a run: what a start and a dry run ask for."""

from dataclasses import replace
from pathlib import Path

import pytest

from sharpmoe.checkpoint import retention
from sharpmoe.checkpoint.load import Found
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointDamageError, CheckpointError
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


def test_milestones_that_are_there_make_no_room(tmp_path: Path) -> None:
    given = {"every": 1, "keep": 2, "keep_every": 5}
    run = make_run(make_shards(tmp_path / "shards"), tmp_path / "runs", train={"steps": 20}, checkpoint=given)
    plan = plan_for(run, ALONE)
    assert CheckpointSpace.of(plan)[1:3] == (7, 7)  # 4 milestones, 2, and the one that is written
    folders = [tmp_path / f"step{step:08d}" for step in (5, 9, 10)]
    damaged = tuple((folder, CheckpointDamageError("x")) for folder in folders)
    later = CheckpointSpace.of(replace(plan, found=Found(damaged=damaged), run=resumed(run)))
    assert later.more == 7 - 1  # of the three there, two are milestones and stay
    assert later.most == 9


def resumed(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})


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
    assert most(every=0, minutes=10) == 3
    assert most(99, every=0, minutes=10) == 1
