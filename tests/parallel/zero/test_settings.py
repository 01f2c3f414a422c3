"""Offloading: what of it is read from the engine's configuration, planned, and trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.plan import main as plan
from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.parallel.zero.engine import Engine, _update_device
from sharpmoe.parallel.zero.settings import regather_warnings, zero_title
from sharpmoe.planning.auto import resolve_schedule
from sharpmoe.planning.estimate import Estimate, Planner
from sharpmoe.planning.layout import rank_parameters
from sharpmoe.planning.rehearsal import Target, rehearse
from sharpmoe.train import loop
from sharpmoe.train.rollout_schedules import schedule_of
from sharpmoe.train.setup import make_plan
from tests.distributed import run_ranks
from tests.train.setting import ALONE, make_run, plan_for, stirred_model, worst

CPU = {"device": "cpu"}
OFFLOADED: dict[str, dict[str, Any]] = {
    "2": {"stage": 2, "offload_optimizer": CPU},
    "3": {"stage": 3, "offload_optimizer": CPU},
    "3, both": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}


def written(folder: Path, zero: dict[str, Any]) -> Path:
    path = folder / f"zero{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLOADED)
def test_what_is_offloaded_is_planned_in_host_memory(
    name: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(shards, tmp_path / "runs", rollout={"schedule": "auto"}, stage="pretrain")
    zero = OFFLOADED[name]
    files = [written(tmp_path, {"stage": zero["stage"]}), written(tmp_path, zero)]
    inside, outside = (resolve_ds_config(file, run, 2) for file in files)

    def planned(ds_config: dict[str, Any]) -> Estimate:
        found = resolve_schedule(run, ds_config, 2, 8.0).run
        planner = Planner(found)
        return planner.estimate(planner.layout(2, ds_config), schedule_of(found))

    before, after = planned(inside).memory, planned(outside).memory
    state = before.masters + before.gradients + before.optimizer + before.ema
    assert before.host == 0
    assert after.host == state + (before.weights if "offload_param" in zero else 0)
    assert after.peak < before.peak
    moved = "optimizer and parameters" if "offload_param" in zero else "optimizer"
    assert zero_title(outside) == f"ZeRO-{zero['stage']} ({moved} in host memory)"
    words = ["--deepspeed", str(files[1]), "--zero", str(zero["stage"]), "--world", "2", "--schedule", "auto"]
    assert plan(words) == 0
    assert "  in host memory" in capsys.readouterr().out
    ds_config = resolve_ds_config(files[1], run, 1)
    said = rehearse(run, ds_config, ALONE, Target.of(ALONE, 8.0))
    assert f"({moved} in host memory)" in said
    assert "per rank in host memory (offloaded)" in said


def test_an_offloaded_optimizer_is_one_of_the_host() -> None:
    for zero, device in (({"stage": 2}, "cuda"), (OFFLOADED["2"], "cpu"), (OFFLOADED["3, both"], "cpu")):
        ds_config = {"zero_optimization": zero, "bf16": {"enabled": True}}
        assert _update_device(ds_config, torch.device("cuda")).type == device


def trained(world: World, run: Any, ds_config: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(loop.train(make_plan(run, ds_config, world), world) / "live.safetensors")


@pytest.mark.dist
def test_a_run_with_an_offloaded_optimizer_equals_one_without(shards: Path, tmp_path: Path) -> None:
    """ZeRO-2 bit for bit. ZeRO-3 multiplies gradients for clipping where otherwise the optimizer divides them."""
    for name, zero in OFFLOADED.items():
        weights = []
        for part in ({"stage": zero["stage"]}, zero):
            output = tmp_path / f"{name} {len(part)}"
            run = make_run(shards, output, stage="pretrain", train={"steps": 2})
            ds_config = resolve_ds_config(written(tmp_path, part), run, 1)
            (found,) = run_ranks(trained, 1, run, ds_config)
            weights.append(found)
        assert worst(*weights) <= (0 if zero["stage"] == 2 else 1e-5), name


def warned(world: World, run: RunConfig) -> tuple[int, int, list[int]]:
    """Parameters of a rank and of the model, and how many warnings limits of 0 and of these give."""
    ds_config = plan_for(run, world, 3).ds_config
    engine = Engine(stirred_model(run), run, ds_config, world)
    held, whole = engine.held_parameters, engine.num_parameters
    counts = []
    for limit in (0, held, whole):
        ds_config["zero_optimization"] |= {"stage3_max_reuse_distance": limit, "stage3_max_live_parameters": limit}
        counts.append(len(regather_warnings(ds_config, held, uses=6)))
    return held, whole, counts


@pytest.mark.dist
def test_limits_of_gathers_are_compared_with_the_experts_of_a_rank(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, parallel={"ep_size": 2})
    planned = sum(part.numel for part in rank_parameters(run, 2, 2))
    for held, whole, counts in run_ranks(warned, 2, run):
        assert held == planned < whole
        assert counts == [2, 0, 0]
