"""`rollout.schedule: auto` against the plan, from the choice to a run that changes its schedule on the way."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.advice import RESERVE, usable
from sharpmoe.planning.auto import _cheapest, resolve_schedule
from sharpmoe.planning.estimate import Planner
from sharpmoe.train import loop
from sharpmoe.train.rollout_schedules import schedule_of, with_schedule
from sharpmoe.train.setup import make_plan
from tests.distributed import run_ranks
from tests.train.setting import ALONE, CONFIGS, make_run

GIB = 2**30
ZERO3 = CONFIGS / "zero3.json"
L_RUN = CONFIGS / "runs" / "imagenet256" / "diffmoe_l_sharp.yaml"


def peak(run: RunConfig, world: int, **rollout: Any) -> float:
    """GiB as planned."""
    planner = Planner(run)
    layout = planner.layout(world, resolve_ds_config(ZERO3, run, world))
    return planner.estimate(layout, schedule_of(with_schedule(run, **rollout))).memory.peak / GIB


def tiny(router: str = "diffmoe", **sections: Any) -> RunConfig:
    return make_run(Path("shards"), Path("runs"), router, rollout={"schedule": "auto"}, **sections)


def of_ten_steps(router: str = "diffmoe") -> RunConfig:
    return make_run(Path("none"), Path("none"), router, rollout={"num_steps": 10, "schedule": "auto"})


def between(*peaks: float) -> float:
    """Memory of a device, GiB, that has room for the lower of two peaks."""
    return sum(peaks) / 2 / (1 - RESERVE)


def graphs(run: RunConfig) -> float:
    """A memory plan: the graphs that a schedule keeps, of one GiB; blocks' inputs are a twentieth."""
    rollout = run.rollout
    kept = {"plain": rollout.num_steps, "hybrid": rollout.kept_steps or 0, "two_pass": 1}
    return 2**30 * kept.get(rollout.schedule, rollout.num_steps / 20)


def named(run: RunConfig, room: float) -> tuple[str, int | None]:
    chosen = _cheapest(run, graphs, room * 2**30)
    chosen.check()
    return chosen.run.rollout.schedule, chosen.run.rollout.kept_steps


def test_the_cheapest_that_fits() -> None:
    assert [named(of_ten_steps(), room) for room in (10, 9.5, 4.2, 1, 0.5)] == [
        ("plain", None), ("hybrid", 9), ("hybrid", 4), ("hybrid", 1), ("checkpoint", None)
    ]  # fmt: skip
    assert [named(of_ten_steps("tc"), room)[0] for room in (10, 9, 0.6)] == ["plain", "two_pass", "checkpoint"]
    with pytest.raises(ConfigError, match=r"no schedule that fits 0\.4 GiB, the smallest takes 0\.5"):
        named(of_ten_steps(), 0.4)
    smallest = _cheapest(of_ten_steps(), graphs, 0)
    assert (smallest.run.rollout.schedule, smallest.fits) == ("checkpoint", False)


@pytest.mark.slow
def test_ten_graphs_of_l_at_32_images_fit_a_device_of_139_gib() -> None:
    """As planned; 8 ranks, bfloat16, ZeRO-3."""
    run = load_run_config(L_RUN, ["--rollout.schedule=auto"])
    ds_config = resolve_ds_config(ZERO3, run, 8)
    assert (run.train.global_batch, run.train.precision, run.rollout.num_steps) == (256, "bf16", 10)
    found, (note,) = resolve_schedule(run, ds_config, 8, 139)
    assert found.rollout.schedule == "plain"
    assert peak(found, 8, schedule="plain") < 120
    assert note.startswith("rollout.schedule: auto took plain (30 forwards' worth per micro-batch): ")


@pytest.mark.slow
def test_less_memory_keeps_fewer_graphs() -> None:
    run = load_run_config(L_RUN, ["--rollout.schedule=auto"])
    ds_config = resolve_ds_config(ZERO3, run, 8)
    found, (note,) = resolve_schedule(run, ds_config, 8, 80)
    kept = found.rollout.kept_steps
    assert found.rollout.schedule == "hybrid"
    assert kept is not None
    assert peak(run, 8, schedule="hybrid", kept_steps=kept) <= usable(80) / GIB
    assert peak(run, 8, schedule="hybrid", kept_steps=kept + 1) > usable(80) / GIB
    assert "cheaper, and too large: plain " in note
    assert f"hybrid, kept_steps {kept + 1} " in note
    with pytest.raises(ConfigError, match=r"auto finds no schedule that fits 3\.6 GiB, the smallest takes"):
        resolve_schedule(run, ds_config, 8, 4)


@pytest.mark.slow
def test_without_a_routing_loss_two_passes_are_one() -> None:
    run = tiny("tc", train={"micro_batch": 8})
    ds_config = resolve_ds_config(ZERO3, run, 1)
    all_graphs, one = (peak(run, 1, schedule=name) for name in ("plain", "two_pass"))
    assert resolve_schedule(run, ds_config, 1, between(all_graphs, one)).run.rollout.schedule == "two_pass"
    assert resolve_schedule(run, ds_config, 1, between(all_graphs, 2 * all_graphs)).run.rollout.schedule == "plain"


def test_what_is_asked_for_is_not_touched() -> None:
    run = tiny().model_copy(update={"rollout": with_schedule(tiny(), schedule="segments").rollout})
    assert resolve_schedule(run, {}, 1, 0.0) == (run, ())


def start(world: World, run: RunConfig, memories: list[float]) -> tuple[str, ...]:
    """A run as the launcher starts it, on devices of so many GiB each; the notes."""
    launch._own_memory = lambda world: memories[world.rank]
    ds_config = resolve_ds_config(ZERO3, run, world.size)
    found, notes = resolve_schedule(run, ds_config, world.size, launch.least_memory(world))
    loop.train(make_plan(found, ds_config, world, notes), world)
    return notes


@pytest.mark.dist
def test_a_run_goes_on_under_another_schedule(shards: Path, tmp_path: Path) -> None:
    """One of two ranks comes back on a smaller device; both take the schedule that fits it, and the losses go on."""
    auto = make_run(
        shards, tmp_path, rollout={"schedule": "auto"}, train={"micro_batch": 4}, checkpoint={"resume": "auto"}
    )
    half = auto.model_copy(update={"train": auto.train.model_copy(update={"steps": 2})})
    plain = with_schedule(auto.model_copy(update={"name": "plain"}), schedule="plain")
    smaller = between(peak(auto, 2, schedule="hybrid", kept_steps=2), peak(auto, 2, schedule="hybrid", kept_steps=1))
    first, last, asked = (
        run_ranks(start, 2, run, memories)
        for run, memories in ((half, [8.0, 8.0]), (auto, [8.0, smaller]), (plain, [8.0, 8.0]))
    )
    assert "auto took plain" in first[0][0]
    assert "auto took hybrid, kept_steps 1" in last[0][0]
    assert last[0] == last[1]
    assert asked == [(), ()]
    rollout = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rollout"]
    assert (rollout["schedule"], rollout["kept_steps"]) == ("hybrid", 1)
    ours, theirs = (read_log(tmp_path / name / "log.jsonl")["loss/total"] for name in ("run", "plain"))
    assert list(ours) == [1, 2, 3, 4]
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-5
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("rollout.schedule" in str(event.get("changed")) for event in events)


def test_data_that_a_run_accepts_with_damage_are_planned_with(shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(shards, tmp_path / "shards")
    cut = data / "train-00000.tar"
    cut.write_bytes(cut.read_bytes()[:-1024])
    for fraction, is_accepted in ((0.0, False), (0.5, True)):
        run = make_run(data, tmp_path, data={"max_bad_fraction": fraction}, rollout={"schedule": "auto"})
        with nullcontext() if is_accepted else pytest.raises(DataError, match="shard has .* bytes, expected"):
            resolved = resolve_schedule(run, resolve_ds_config(ZERO3, run, 1), 1, 80.0).run
            assert make_plan(resolved, resolve_ds_config(ZERO3, resolved, 1), ALONE).data.train.num_samples == 20
