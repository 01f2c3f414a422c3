"""An engine step on a device against the same step in float64 on the CPU, without an engine."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.step import _trained_segment, train_step
from tests.gpu.place import DEVICES, run_on
from tests.parallel.reference import items_of, watched
from tests.train.setting import ALONE, make_run, plan_for, stirred_model

LR, STEP = 0.05, 0
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "merged": {"schedule": "two_pass", "merged_steps": 2},
    "hybrid": {"schedule": "hybrid", "kept_steps": 1},
    "segments": {"schedule": "segments", "segment_steps": 2},
}
# Distance of all gradients together, and of the change of the weights, relative to their norm. In bf16 near-ties of the
# routing fall either way, and the gradients of a token that goes to another expert are other ones.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.3}
NAMES = [f"{schedule} zero{stage} {precision}" for schedule in SCHEDULES for stage in (2, 3) for precision in TOLERANCE]
ON_CPU = ["plain zero2 bf16", "merged zero3 fp32", "segments zero3 bf16"]


def run_of(name: str, folder: Path) -> RunConfig:
    schedule, _, precision = name.split()
    return make_run(
        folder / "shards",
        folder,
        "diffmoe",
        model={"width": 32, "depth": 2},
        rollout={"num_steps": 4, "caption_dropout": 0.0} | SCHEDULES[schedule],
        optim={"name": "sgd", "lr": LR, "clip_norm": 0.0},
        train={"precision": precision},
    )


@cache
def exact(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """The gradient of the step in float64 on the CPU, and the change of the weights by plain SGD with it."""
    run = run_of(name, folder)
    start = stirred_model(run).bfloat16() if run.train.precision == "bf16" else stirred_model(run)  # as the engine's
    objective = Objective(start.double(), run).train()
    items = tuple(doubled(item) for item in items_of(plan_for(run, ALONE), ALONE, 1)[0])
    objective(StepRequest(items, _trained_segment(run, STEP))).loss.backward()
    parameters = objective.model.parameters()
    gradient = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    return gradient, -LR * gradient


def doubled(item: TrajectoryBatch) -> TrajectoryBatch:
    """float64 in place of float32; whole numbers and masks as they are."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return type(value)(*map(double, value))

    return TrajectoryBatch(*map(double, item))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])


def stepped(world: World, names: list[str], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By case: the gradient of the engine's step and the change of the float32 weights."""
    found = {}
    for name in names:
        run, stage = run_of(name, folder), int(name.split()[1][-1])
        plan = plan_for(run, world, stage)
        objective = Objective(stirred_model(run), run)
        engine = Engine(objective, run, plan.ds_config, world)
        ema, taken = ShardEma(engine, run.optim.ema_decay), dict[str, Tensor]()
        (items,) = items_of(plan, world, 1)
        keys = [key for key, _ in objective.model.named_parameters()]
        before = engine.full_weights(objective.model)
        train_step(watched(engine, objective, taken), objective, ema, items, STEP, with_routing=False)
        after = engine.full_weights(objective.model)
        found[name] = (flat([taken[key] for key in keys]), flat([after[key] - before[key] for key in keys]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("engine")
    (root / "shards").symlink_to(shards)
    return root


def compare(found: dict[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    apart = {}
    for name, (gradient, change) in found.items():
        expected, moving = exact(name.replace("zero2", "zero3"), folder)  # no engine: the stage does not matter
        assert expected.norm() > 0.1
        precision = name.split()[2]
        far = float((gradient - expected).norm() / expected.norm())
        moved = float((change - moving).norm() / moving.norm())
        print(f"{name}: gradient {far:.2e}, update {moved:.2e}")
        if max(far, moved) > TOLERANCE[precision]:
            apart[name] = (far, moved)
    assert apart == {}


@pytest.mark.dist
def test_on_the_cpu_a_step_is_that_of_float64(folder: Path) -> None:
    """tests/parallel/zero/test_engine.py compares more on the CPU, with float32."""
    compare(run_on("cpu", stepped, ON_CPU, folder), folder)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_cuda_a_step_is_that_of_float64(name: str, folder: Path) -> None:
    compare(run_on("cuda", stepped, [name], folder), folder)


def fifty(world: World, folder: Path, steps: int, stage: int) -> list[bool | float]:
    """Weights after steps with buckets of a few parameters, with overlapping communication and without."""
    weights = []
    for overlap in (False, True):
        run = run_of("plain zero3 fp32", folder)
        plan = plan_for(run, world, stage)
        zero = plan.ds_config["zero_optimization"]
        zero |= {"overlap_comm": overlap, "reduce_bucket_size": 2_000}
        zero |= {"stage3_prefetch_bucket_size": 1_000} if stage == 3 else {"allgather_bucket_size": 2_000}
        objective = Objective(stirred_model(run), run)
        engine = Engine(objective, run, plan.ds_config, world)
        ema = ShardEma(engine, run.optim.ema_decay)
        for step, items in enumerate(items_of(plan, world, steps)):
            train_step(engine, objective, ema, items, step, with_routing=False)
        whole = engine.full_weights(objective.model)
        weights.append(flat([whole[name] for name, _ in objective.model.named_parameters()]))
    start = flat(list(stirred_model(run).parameters()))
    return [torch.equal(*weights), float((weights[0] - start).norm() / start.norm())]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_overlapping_communication_changes_no_bit(device: str, stage: int, folder: Path) -> None:
    """A bucket that is reused before its copy is finished shows only after some steps, and only on a device."""
    same, moved = run_on(device, fifty, folder, 4 if device == "cpu" else 50, stage)
    assert same
    assert moved > 1e-3
