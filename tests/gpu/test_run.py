"""Runs on a device: resumed bit by bit, saved while they go on, and as large in memory as was planned."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_check.training import compare, fork
from sharpmoe.checkpoint import manifest
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.planning.estimate import Planner
from sharpmoe.train import loop
from sharpmoe.train.session import Session
from sharpmoe.train.setup import initial_model
from sharpmoe.train.step import train_step
from tests.fixtures_data import make_shards
from tests.gpu.place import DEVICES, run_fresh, run_on
from tests.parallel.reference import items_of
from tests.train.setting import identical, make_run, plan_for

STEPS, RESUMED = 4, 2
WITHIN = 0.10  # of the planned peak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    (root / "shards").symlink_to(shards)
    make_shards(root / "large", 24, 128)
    return root


def resumed(world: World, folder: Path, router: str, precision: str) -> dict[str, Any]:
    """Train, train again from the checkpoint in the middle, and compare the last checkpoints; 256 tokens per image."""
    runs = []
    for name in ("whole", "again"):
        run = make_run(
            folder / "large",
            folder / f"{router} {precision}",
            router,
            name=name,
            stage="pretrain",
            model={"width": 32, "depth": 2, "latent_size": 32},
            train={"steps": STEPS, "precision": precision, "global_batch": 4, "micro_batch": 4, "deterministic": True},
            checkpoint={"every": RESUMED, "keep": STEPS, "resume": "auto"},
        )
        runs.append(Path(run.output) / name)
        if name == "again":
            fork(*runs, RESUMED)
        loop.train(plan_for(run, world), world)
    return compare(*runs)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("router", ["diffmoe", "tc"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_has_the_same_bits(
    device: str, router: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strict mode, with more tokens than the 128 up to which attention has one order of its sums."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA reads it at the start of a process
    (found,) = run_fresh(device, resumed, 1, folder, router, "bf16")
    assert found["same_bits"], found
    assert found["losses_differ_at"] == []


def saved_beside(world: World, folder: Path, device: str) -> list[bool]:
    """Begin a save, train on at once, and compare what was written with the state at the beginning of the save."""
    run = make_run(folder / "shards", folder / f"saved {device}", train={"precision": "bf16"})
    session = opened(run, world)
    steps = items_of(session.plan, world, 5)
    step_on(session, steps[:2], 0)
    at_begin = [part.detach().clone() for part in parts_of(session)]
    weights = session.engine.full_weights(session.objective.model)
    session.checkpoints.begin(Progress(2, 16))
    step_on(session, steps[2:], 2)
    moved = not any(torch.equal(a, b) for a, b in zip(at_begin, parts_of(session), strict=True) if a.numel() > 100)
    outcome = session.checkpoints.wait()
    assert outcome is not None
    assert outcome.folder is not None
    session.checkpoints.load(manifest.verify_checkpoint(outcome.folder))
    restored = [torch.equal(a, b.detach()) for a, b in zip(at_begin, parts_of(session), strict=True)]
    again = session.engine.full_weights(session.objective.model)
    return [moved, all(restored), identical(weights, again)]


def opened(run: RunConfig, world: World) -> Session:
    plan = plan_for(run, world)
    return loop.open_session(plan, world, initial_model(plan))


def step_on(session: Session, steps: list[list[Any]], first: int) -> None:
    for step, items in enumerate(steps, first):
        train_step(session.engine, session.objective, session.ema, items, step, with_routing=False)


def parts_of(session: Session) -> list[Tensor]:
    partitions = session.engine.state.partitions()
    return [part for parts in (*partitions.values(), session.ema.shards) for part in parts]


@pytest.mark.dist
@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_saved_beside_training_is_that_of_its_step(device: str, folder: Path) -> None:
    moved, restored, same = run_on(device, saved_beside, folder, device)
    assert moved  # training did not wait for the save
    assert restored
    assert same


def planned_and_allocated(world: World, folder: Path, schedule: str) -> tuple[float, float]:
    """The planned peak of a step, and what was allocated at the most, in bytes."""
    run = make_run(
        folder / "large",
        folder / f"memory {schedule}",
        "diffmoe",
        model={"width": 384, "depth": 8, "num_heads": 6, "latent_size": 32, "num_experts": 8},
        rollout={"num_steps": 4, "schedule": schedule},
        optim={"name": "adamw"},
        train={"precision": "bf16", "global_batch": 8, "micro_batch": 8},
    )
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    session = opened(run, world)
    steps = items_of(session.plan, world, 4)
    step_on(session, steps[:2], 0)  # the optimizer's state is made in the first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step_on(session, steps[2:], 2)
    torch.cuda.synchronize()
    planner = Planner(run)
    memory = planner.budget(planner.layout(world.size, session.plan.ds_config)).own.memory
    return memory.state + max(memory.backward, memory.update), torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["plain", "two_pass", "checkpoint"])
def test_the_plan_is_what_is_allocated(schedule: str, folder: Path) -> None:
    """tests/planning/test_counted.py compares plans with what ranks on the CPU allocate."""
    planned, allocated = run_on("cuda", planned_and_allocated, folder, schedule)
    assert allocated > 2**28
    assert abs(planned / allocated - 1) <= WITHIN, (planned / 2**20, allocated / 2**20)
