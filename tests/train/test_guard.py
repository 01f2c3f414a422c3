"""Numbers that go wrong on one rank: nothing moves on any, what was fed is on record, and the run goes on or ends."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharpmoe.config import GuardConfig, RunConfig
from sharpmoe.errors import SharpMoEError
from sharpmoe.log_file import read_log, read_log_lines
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train import loop
from sharpmoe.train.guard import Watch, _spike_limit, loss_fault, next_watch, norm_fault
from sharpmoe.train.objective import Objective
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.step import StepResult, train_step
from tests.distributed import run_ranks
from tests.parallel.reference import items_of
from tests.train.setting import make_run, plan_for, stirred_model

BAD = {2: "loss", 4: "gradient"}  # step -> what is poisoned
STEPS = 6


class Poison(torch.autograd.Function):
    """Identity whose gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


class Trainer:
    """A model under the engine, stepped by hand."""

    def __init__(self, run: RunConfig, stage: int, offload: bool, world: World) -> None:
        self.plan = plan_for(run, world, stage)
        if offload:
            self.plan.ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        self.objective = Objective(stirred_model(run), run)
        self.engine = Engine(self.objective, run, self.plan.ds_config, world)
        self.ema = ShardEma(self.engine, run.optim.ema_decay)

    def step(self, items: list[TrajectoryBatch], step: int) -> StepResult:
        return train_step(self.engine, self.objective, self.ema, items, step, with_routing=False)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step moves on this rank, cloned."""
        masters = {f"master{i}": part for i, part in enumerate(self.engine.state.masters())}
        ema = {f"ema{i}": part for i, part in enumerate(self.ema.shards)}
        buffers = dict(self.objective.named_buffers())
        weights = {f"forward {name}": shard(p) for name, p in self.objective.named_parameters()}
        states = self.engine._zero.optimizer.state.values()
        moments = {
            f"{key}{i}": torch.as_tensor(value) for i, state in enumerate(states) for key, value in state.items()
        }
        found = masters | ema | buffers | weights | moments
        return {name: value.detach().clone() for name, value in found.items()}


def shard(parameter: torch.nn.Parameter) -> Tensor:
    """What this rank keeps of a parameter between steps: ZeRO-3's partition, or the whole."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


class Seen(NamedTuple):
    """What one rank saw of the poisoned steps, and how far the run is from one without them."""

    verdicts: list[tuple[str, bool]]
    moved: list[list[str]]  # by each poisoned step
    still: list[str]  # by the last one, which is good
    apart: list[str]  # at the end, from a run that left the poisoned steps out
    adam: set[float]  # step counts at the end


def poisoned(world: World, run: RunConfig, stage: int, offload: bool) -> Seen:
    trainer, twin = (Trainer(run, stage, offload, world) for _ in range(2))
    verdicts, moved, still = [], [], list[str]()
    for step, items in enumerate(items_of(trainer.plan, world, STEPS)):
        before = trainer.state()
        bad = step in BAD and world.rank == world.size - 1
        result = trainer.step(poison(trainer, items, BAD[step]) if bad else items, step)
        trainer.engine.__dict__.pop("backward", None)
        now = trainer.state()
        still = [name for name in now if name in before and torch.equal(now[name], before[name])]
        if step in BAD:
            verdicts.append(tuple(result.verdict))
            moved.append([name for name in now if name not in still])
        else:
            twin.step(items, step)
    ours, theirs = trainer.state(), twin.state()
    apart = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    adam = {float(value) for name, value in ours.items() if name.startswith("step")}
    return Seen(verdicts, moved, [name for name in still if "pos_embed" not in name], apart, adam)


def poison(trainer: Trainer, items: list[TrajectoryBatch], kind: str) -> list[TrajectoryBatch]:
    """Spoil the first micro-batch, or the gradient of a loss that is finite."""
    if kind == "loss":
        return [items[0]._replace(x0=items[0].x0 * torch.nan), *items[1:]]
    backward = trainer.engine.backward
    trainer.engine.backward = lambda loss: backward(Poison.apply(loss))  # type: ignore[method-assign]
    return items


def all_poisoned(world: World, cases: list[tuple[RunConfig, int, bool]]) -> list[Seen]:
    return [poisoned(world, *case) for case in cases]


@pytest.mark.dist
@pytest.mark.slow
def test_a_poisoned_step_on_one_rank_moves_nothing_on_any(shards: Path, tmp_path: Path) -> None:
    small = {"model": {"depth": 2}, "rollout": {"num_steps": 2}}
    runs = [make_run(shards, tmp_path, train={"precision": p, "micro_batch": 2}, **small) for p in ("fp32", "bf16")]
    cases = [(run, stage, False) for run in runs for stage in (2, 3)] + [(runs[1], stage, True) for stage in (2, 3)]
    for answers in run_ranks(all_poisoned, 2, cases):
        for (run, stage, offload), seen in zip(cases, answers, strict=True):
            case = f"ZeRO-{stage} {run.train.precision}, offload {offload}"
            expected = ["loss flow is not finite", "gradient norm is not finite"]
            assert seen.verdicts == [(fault, False) for fault in expected], case
            assert seen.moved == [[], []], case
            assert seen.still == [], case  # so the comparison sees what moves
            assert seen.apart == [], case  # no gradient was left behind
            assert seen.adam == {STEPS - 2.0}, case


def poison_samples(plan: RunPlan, positions: range) -> None:
    """Samples at these places of the data order come as infinities."""
    read = plan.data.train.load

    def load(stream: int, index: int, draw: Any) -> Any:
        given = read(stream, index, draw)
        return replace(given, latent=given.latent * np.float32(1e30)) if draw.position in positions else given

    plan.data.train.load = load  # type: ignore[method-assign]


def trained(world: World, run: RunConfig, positions: range) -> str:
    plan = plan_for(run, world)
    if world.rank == world.size - 1:
        poison_samples(plan, positions)
    try:
        loop.train(plan, world)
    except SharpMoEError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.dist
def test_a_run_goes_on_after_a_bad_batch_and_keeps_its_samples(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path)
    assert run_ranks(trained, 2, run, range(8, 16)) == ["done", "done"]
    folder = tmp_path / "run"
    (path,) = (folder / "faults").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "step00000002.json"
    assert (record["step"], record["fault"], record["applied"]) == (2, "loss flow is not finite on rank 1", False)
    assert [rank["finite"] for rank in record["ranks"]] == [True, False]
    assert [micro["positions"] for rank in record["ranks"] for micro in rank["micro_batches"]] == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    (micro,) = record["ranks"][1]["micro_batches"]
    assert all(key.startswith("shape-") for key in micro["keys"])
    assert torch.tensor(micro["times"]).shape == (3, 4)
    assert micro["losses"]["flow"] in ("nan", "inf")
    log = read_log(folder / "log.jsonl")
    assert list(log["loss/total"]) == [1, 3, 4]
    (event,) = [line for line in read_log_lines(folder / "log.jsonl") if line.get("event") == "fault"]
    assert (event["step"], event["applied"], event["skipped"]) == (2, False, 1)


@pytest.mark.dist
def test_bad_steps_in_a_row_end_the_run_on_all_ranks(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, train={"steps": 6}, guard={"max_skipped": 3})
    answers = run_ranks(trained, 2, run, range(8, 1000))
    assert len(set(answers)) == 1
    assert answers[0].startswith("TrainingError: step 4: 3 step(s) in a row skipped, the last because loss flow is not")
    assert "the weights are still those after step 1;" in answers[0]
    assert "\n" not in answers[0]
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("bad", "end"),
    [
        (range(16, 32), "TrainingError: step 4: 2 step(s) in a row skipped"),
        (range(24, 32), "done"),  # one bad batch, which happens to be the last
    ],
)
def test_a_run_does_not_end_well_with_skipped_steps(bad: range, end: str, shards: Path, tmp_path: Path) -> None:
    (answer,) = run_ranks(trained, 1, make_run(shards, tmp_path), bad)
    assert answer.startswith(end)
    assert (tmp_path / "run" / "checkpoints" / "latest").exists() == (end == "done")
    assert end == "done" or answer.endswith("go on from a checkpoint (they are the last of the run)")


@pytest.mark.dist
def test_a_run_whose_only_step_was_skipped_does_not_end_well(shards: Path, tmp_path: Path) -> None:
    (answer,) = run_ranks(trained, 1, make_run(shards, tmp_path, train={"steps": 1}), range(8))
    assert answer.startswith("TrainingError: step 1: 1 step(s) in a row skipped")


def explode_at(world: World, run: RunConfig, step: int) -> str:
    """Train; after this step, which is finite itself, one weight is not."""
    take = loop.train_step

    def poisoned_step(engine: Any, *args: Any) -> Any:
        result = take(engine, *args)
        if args[3] + 1 == step and world.rank == world.size - 1:
            engine.state.masters()[0].data.view(-1)[0] = torch.inf
        return result

    loop.train_step = poisoned_step  # type: ignore[attr-defined]
    return trained(world, run, range(0))


@pytest.mark.dist
def test_weights_that_are_not_finite_do_not_end_as_done(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, checkpoint={"every": 1, "asynchronous": False})
    answers = run_ranks(explode_at, 2, run, 4)
    root = tmp_path / "run" / "checkpoints"
    assert len(set(answers)) == 1
    assert answers[0].startswith(f"CheckpointError: rank 0: {root}: step 4 is not saved: ")
    assert answers[0].endswith("lower optim.lr, and go on from an earlier checkpoint or start again")
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step00000002", "step00000003"]
    assert (root / "latest").read_text() == "step00000003"


def stopping_at(world: World, runs: list[RunConfig]) -> None:
    for run in runs:
        loop.train(plan_for(run, world), world)


@pytest.mark.dist
def test_spikes_are_skipped_alike_by_a_run_that_was_interrupted(shards: Path, tmp_path: Path) -> None:
    guard = {"spike_factor": 1.01, "spike_window": 2, "skip_spikes": True}
    sections = {"guard": guard, "checkpoint": {"resume": "auto"}, "stage": "pretrain"}
    stops = [("once", 6), ("twice", 3), ("twice", 6)]
    run_ranks(stopping_at, 1, [make_run(shards, tmp_path, name=n, train={"steps": s}, **sections) for n, s in stops])
    once, twice = (tmp_path / name / "log.jsonl" for name in ("once", "twice"))
    assert read_log(once)["loss/total"] == read_log(twice)["loss/total"]
    faults = [line for line in read_log_lines(once) if line.get("event") == "fault"]
    assert any(fault["step"] > 3 for fault in faults)
    assert not any(fault["applied"] for fault in faults)
    assert all("times its moving average" in fault["fault"] for fault in faults)
    resume = next(line for line in read_log_lines(twice) if line.get("event") == "resume")
    assert resume["step"] == 3
    assert resume["changed"] == {"train.steps": [3, 6]}


def test_spikes_are_reported_but_taken_by_default() -> None:
    guard = GuardConfig(spike_window=3)
    watch = Watch()
    for norm in (1.0, 2.0, 3.0):
        assert norm_fault(norm * 1000, watch, guard) == ""  # too young to judge
        watch = next_watch(watch, norm, True, guard)
    assert watch == Watch(2.0, 3, 0)
    assert norm_fault(20.0, watch, guard) == ""
    assert norm_fault(21.0, watch, guard) == "gradient norm 21 is 10.5 times its moving average 2"
    assert not guard.skip_spikes


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.integers(1, 10), st.floats(1.5, 20), st.booleans())
def test_the_watch_stays_between_the_norms_it_saw(norms: list[float], window: int, factor: float, taken: bool) -> None:
    guard = GuardConfig(spike_window=window, spike_factor=factor)
    watch = Watch()
    for norm in norms:
        ceiling = _spike_limit(watch, guard)
        watch = next_watch(watch, norm, taken, guard)
        slack = 1e-9 * max(norms)
        assert min(min(norms), ceiling) - slack <= watch.average <= max(norms) + slack
        assert watch.seen <= window
    assert watch.skipped == (0 if taken else len(norms))
    assert next_watch(watch, math.inf, False, guard)[:2] == watch[:2]  # what is no number teaches nothing


def test_a_change_of_level_is_followed() -> None:
    guard = GuardConfig(spike_window=10, spike_factor=4)
    watch = Watch(1.0, 10, 0)
    spikes = 0
    while norm_fault(100.0, watch, guard):
        watch, spikes = next_watch(watch, 100.0, False, guard), spikes + 1
    assert 5 < spikes < 20


def test_a_bad_loss_is_named_by_its_part() -> None:
    assert loss_fault({"total": math.nan, "flow": 1.0, "routing": math.inf}) == "loss routing is not finite"
    assert loss_fault({"total": math.inf, "flow": 1.0}) == "loss total is not finite"
    assert loss_fault({"total": 1.0}) == ""
