"""Steps of a trajectory as one pool: what a run keeps from step to step, resumes, refuses, and logs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from sharpmoe.checkpoint.manifest import read_manifest
from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks import launch
from sharpmoe.train import loop
from sharpmoe.train.tally import pools_trajectories
from tests.train.setting import ALONE, identical, make_run, plan_for

POOL: dict[str, Any] = {"num_steps": 3, "pool": "trajectory"}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    assert launch.start() == ALONE
    yield
    launch.stop()


def trained(run: RunConfig, *ends: int) -> Path:
    """Train to each of the steps `ends`, resuming; returns the last checkpoint."""
    for last in ends:
        plan = plan_for(run, ALONE)
        plan = replace(plan, run=run.model_copy(update={"train": run.train.model_copy(update={"steps": last})}))
        folder = loop.train(plan, ALONE)
    return folder


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_cutoffs(shards: Path, tmp_path: Path) -> None:
    def run(name: str) -> RunConfig:
        return make_run(shards, tmp_path, name=name, rollout=POOL, checkpoint={"resume": "auto"})

    whole, halves = trained(run("whole"), 4), trained(run("halves"), 2, 4)
    for kind in ("ema", "live"):
        assert identical(load_file(whole / f"{kind}.safetensors"), load_file(halves / f"{kind}.safetensors"))
    kept = read_manifest(halves).progress.cutoffs
    assert kept == read_manifest(whole).progress.cutoffs
    assert torch.tensor(kept).shape == (2, 4)
    assert 0 < min(map(min, kept)) <= max(map(max, kept)) < 1  # softmax scores
    loads = read_log(tmp_path / "whole" / "log.jsonl")["routing_load_max/layer0"]
    assert loads[1] == 1, "before there are cutoffs every expert takes as many tokens as any other"
    assert all(value > 1 for step, value in loads.items() if step > 1)


def test_a_model_without_moe_layers_has_no_pool(shards: Path, tmp_path: Path) -> None:
    fields = {"depth": 1, "moe_every": 2, "saliency_router": False}
    run = make_run(shards, tmp_path, rollout=POOL, model=fields, loss={"routing_weight": 0.0})
    assert run.model.num_moe_layers == 0
    folder = trained(run, 1)
    assert read_manifest(folder).progress.cutoffs == ()


@pytest.mark.slow
def test_a_run_may_go_back_to_pools_of_one_step(shards: Path, tmp_path: Path) -> None:
    """What an older checkpoint does not have, and what a later run does not want, is no error."""

    def run(pool: str) -> RunConfig:
        return make_run(shards, tmp_path, rollout=POOL | {"pool": pool}, checkpoint={"resume": "auto"})

    assert read_manifest(trained(run("step"), 1)).progress.cutoffs == ()
    assert read_manifest(trained(run("trajectory"), 2)).progress.cutoffs
    assert read_manifest(trained(run("step"), 3)).progress.cutoffs == ()


def test_who_pools_trajectories(shards: Path, tmp_path: Path) -> None:
    for router, pools in {"diffmoe": True, "race": True, "ec": False, "tc": False}.items():
        assert pools_trajectories(make_run(shards, tmp_path, router, rollout=POOL)) is pools
        assert not pools_trajectories(make_run(shards, tmp_path, router))
    assert not pools_trajectories(make_run(shards, tmp_path, stage="pretrain", rollout=POOL))


def test_a_pool_of_ranks_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"set that to rank, or rollout\.pool to step"):
        make_run(shards, tmp_path, rollout=POOL, parallel={"pool_scope": "world"})
