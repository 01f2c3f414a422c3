"""Scales of L_routing from the training split: found once, the same on every rank, kept by a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from sharpmoe.checkpoint.manifest import read_manifest
from sharpmoe.config import LossConfig, RunConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.losses import trajectory_routing
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.saliency import entropy_share
from sharpmoe.train import loop, target
from sharpmoe.train.setup import choose_checkpoint
from sharpmoe.train.target import with_target_scales
from tests.distributed import run_ranks
from tests.train.setting import ALONE, make_run, plan_for

ASKED = {"saliency_entropy": 0.8, "mass_spread": 0.25}


def _maps(run: RunConfig) -> Tensor:
    source = plan_for(run, ALONE).data.train.sources[0]
    return torch.from_numpy(np.stack([source.load(i).saliency for i in range(source.num_samples)])).double()


def test_a_run_that_asks_for_nothing_reads_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_read_maps", None)
    plain = plan_for(make_run(shards, tmp_path), ALONE)
    assert with_target_scales(plain, ALONE) is plain
    unused = plan_for(make_run(shards, tmp_path, loss={"routing_weight": 0.0} | ASKED), ALONE)
    assert with_target_scales(unused, ALONE) is unused


def test_the_scales_do_what_their_keys_say(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, "ec", loss=ASKED, model={"capacity": 2.0})
    plan = with_target_scales(plan_for(run, ALONE), ALONE)
    loss, maps = plan.run.loss, _maps(run)
    assert entropy_share([maps], loss.saliency_scale) == pytest.approx(0.8, abs=1e-5)
    assert "0.800 of log N of entropy on" in plan.notes[-1]
    # Counts that match M exactly have no loss, and vary by a quarter of their mean, the capacity.
    counts = 2.0 + loss.saliency_scale / loss.mass_scale * (maps - maps.mean(1, keepdim=True))
    assert float(trajectory_routing(counts * 6, maps, loss, 6)) == pytest.approx(0, abs=1e-9)
    assert float(counts.std(1, correction=0).mean()) == pytest.approx(0.25 * 2.0, rel=1e-5)
    summed = make_run(shards, tmp_path, "ec", loss=ASKED | {"mass_reduction": "sum"}, model={"capacity": 2.0})
    of_sum = with_target_scales(plan_for(summed, ALONE), ALONE).run
    terms = 3 * run.model.num_moe_layers
    assert float(trajectory_routing(counts * terms, maps, of_sum.loss, terms)) == pytest.approx(0, abs=1e-9)


def test_one_of_the_two_leaves_the_other_as_it_is(shards: Path, tmp_path: Path) -> None:
    only = make_run(shards, tmp_path, "ec", loss={"mass_spread": 0.25, "saliency_scale": 7.0})
    loss = with_target_scales(plan_for(only, ALONE), ALONE).run.loss
    assert (loss.saliency_scale, loss.mass_scale != 3.0) == (7.0, True)
    other = make_run(shards, tmp_path, "ec", loss={"saliency_entropy": 0.9})
    assert with_target_scales(plan_for(other, ALONE), ALONE).run.loss.mass_scale == 3.0


def test_what_cannot_be_had_is_said(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(shards, tmp_path, loss={"saliency_entropy": 1e-6})
    with pytest.raises(ConfigError, match="loss.saliency_entropy is 1e-06, but in .* of log N; set a larger one"):
        with_target_scales(plan_for(run, ALONE), ALONE)
    with pytest.raises(ValueError, match="mass_spread is about counts"):
        LossConfig(mass_spread=0.2, routing_mass="scores")
    monkeypatch.setattr(target, "_read_maps", lambda *_: [])
    with pytest.raises(
        DataError, match="none of its saliency maps can be read.*shards.* verify` names what is damaged"
    ):
        with_target_scales(plan_for(make_run(shards, tmp_path, loss=ASKED), ALONE), ALONE)


def _found(world: World, run: RunConfig) -> tuple[float, float]:
    loss = with_target_scales(plan_for(run, world), world).run.loss
    return loss.saliency_scale, loss.mass_scale


def _train(world: World, run: RunConfig, read: bool) -> None:
    if not read:
        target._read_maps = None  # type: ignore[assignment]
    loop.train(plan_for(run, world), world)


@pytest.mark.dist
def test_all_ranks_find_the_same_and_a_resume_keeps_it(shards: Path, tmp_path: Path) -> None:
    def a_run(steps: int, **loss: Any) -> RunConfig:
        sections = {"train": {"steps": steps}, "checkpoint": {"resume": "auto"}, "model": {"depth": 2}}
        return make_run(shards, tmp_path, "ec", loss=ASKED | loss, **sections)

    alone = _found(ALONE, a_run(1))
    assert run_ranks(_found, 2, a_run(1)) == [alone, alone]
    run_ranks(_train, 2, a_run(1), True)
    run_ranks(_train, 1, a_run(2), False)  # on another world, and without reading the split again
    folder = tmp_path / "run"
    written = yaml.safe_load((folder / "config.yaml").read_text())["loss"]
    saved = read_manifest(folder / "checkpoints" / "step00000002").settings
    assert (written["saliency_scale"], written["mass_scale"]) == alone
    assert (saved["loss.saliency_scale"], saved["loss.mass_scale"]) == alone
    resumed = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"changed"' in line]
    assert len(resumed) == 1
    assert '"train.steps": [1, 2]' in resumed[0]
    assert "_scale" not in resumed[0]
    changed = choose_checkpoint(plan_for(a_run(3, saliency_entropy=0.95), ALONE), ALONE)
    assert with_target_scales(changed, ALONE).run.loss.saliency_scale < alone[0]
