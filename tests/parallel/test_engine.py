"""ZeRO-3 and ZeRO-2 on two ranks against plain torch on one process: the same global batch, the same numbers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import deepspeed.comm.comm
import pytest
import torch
from torch import Tensor

from data_pipeline.stream import stream
from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import ConfigError, TrainingError
from sharpmoe.moe.capacity import update_thresholds
from sharpmoe.parallel.engine import Engine, optimizer_factory, regather_warnings
from sharpmoe.parallel.launch import World
from sharpmoe.train.ema import ShardEma
from sharpmoe.train.objective import Objective, run_schedule
from sharpmoe.train.plan import Plan
from sharpmoe.train.schedule import learning_rate
from sharpmoe.train.step import prepare, train_step
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.train.setting import ALONE, make_run, plan_for, stirred_model, worst

STEPS, FEW = 10, 3
ROUTERS = ("dense", "tc", "ec", "diffmoe")
SCHEDULES: dict[str, dict[str, object]] = {
    "plain": {},
    "recompute": {"checkpoint_blocks": True},
    "two_pass": {"schedule": "two_pass"},
}
SCHEDULES_OF = dict.fromkeys(ROUTERS, ("plain", "two_pass")) | {"diffmoe": tuple(SCHEDULES)}
SGD = {"name": "sgd", "lr": 0.05}


class Trace(NamedTuple):
    """What ten steps left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]  # thresholds included
    average: dict[str, Tensor]  # EMA


class Case(NamedTuple):
    """One engine run."""

    run: RunConfig
    stage: int = 3
    steps: int = STEPS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "shapes")


@pytest.fixture(scope="module")
def make(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    output = tmp_path_factory.mktemp("runs")

    def make_case(router: str, schedule: str = "plain", **sections: dict[str, object]) -> RunConfig:
        rollout = {"num_steps": 3} | SCHEDULES[schedule]
        model = {} if router == "diffmoe" else {"depth": 2}
        return make_run(shards, output, router, optim=SGD, rollout=rollout, model=model, **sections)

    return make_case


def with_engine(world: World, cases: dict[str, Case]) -> dict[str, Trace]:
    """Train every case under the engine; weights are whole on rank 0, empty elsewhere."""
    return {name: one_case(world, case) for name, case in cases.items()}


def one_case(world: World, case: Case) -> Trace:
    plan = plan_for(case.run, world, case.stage)
    objective = Objective(stirred_model(case.run), case.run)
    engine = Engine(objective, case.run, plan.ds_config, world)
    ema = ShardEma(engine, case.run.optim.ema_decay)
    results = [
        train_step(engine, objective, ema, items, step, with_routing=False)
        for step, items in enumerate(items_of(plan, world, case.steps))
    ]
    weights, average = engine.full_weights(objective.model), ema.full_weights(objective.model)
    return Trace([r.losses["total"] for r in results], [r.grad_norm for r in results], weights, average)


def items_of(plan: Plan, world: World, steps: int) -> list[list]:
    batches = stream(
        plan.data.train,
        seed=plan.run.seed,
        global_batch=plan.batch.global_batch,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
    )
    taken = itertools.islice(batches, steps)
    return [prepare(loaded.batches, plan.data.empty_text, plan.run, world.device) for loaded in taken]


def with_plain_torch(run: RunConfig, steps: int = STEPS) -> Trace:
    """The reference: no engine, accumulation by hand."""
    plan = plan_for(run, ALONE)
    objective = Objective(stirred_model(run), run).train()
    model, parameters = objective.model, list(objective.parameters())
    optimizer = torch.optim.SGD(parameters, lr=run.optim.lr)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses, norms = [], []
    for step, items in enumerate(items_of(plan, ALONE, steps)):
        optimizer.zero_grad()
        records = [
            run_schedule(objective, i, run, lambda loss, _: (loss / 2).backward(), guided=objective.guided)
            for i in items
        ]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, run.optim.clip_norm)))
        losses.append(float(torch.stack([r.terms.total for r in records]).mean()))
        optimizer.param_groups[0]["lr"] = learning_rate(run.optim, step, run.train.steps)
        optimizer.step()
        if records[0].thresholds is not None:
            candidates = torch.stack([r.thresholds for r in records]).mean(0)
            update_thresholds([m.expert_threshold for m in model.moe_layers()], candidates, run.optim.threshold_decay)
        for name, value in model.state_dict().items():
            average[name] = value.clone() if "threshold" in name else average[name].lerp(value, 1 - run.optim.ema_decay)
    return Trace(losses, norms, dict(model.state_dict()), average)


@pytest.fixture(scope="module")
def on_two_ranks(make: Callable[..., RunConfig]) -> dict[str, Trace]:
    cases = {
        f"{router} {schedule}": Case(make(router, schedule), steps=STEPS if schedule == "plain" else FEW)
        for router in ROUTERS
        for schedule in SCHEDULES_OF[router]
    }
    cases |= {f"zero2 {way}": Case(make("diffmoe", way), 2, FEW) for way in ("plain", "two_pass")}
    return run_ranks(with_engine, 2, cases)[0]


def assert_same(trace: Trace, reference: Trace) -> None:
    assert max(abs(a - b) for a, b in zip(trace.losses, reference.losses, strict=True)) < 1e-5
    assert max(abs(a - b) / b for a, b in zip(trace.norms, reference.norms, strict=True)) < 1e-4
    assert worst(trace.weights, reference.weights) < 1e-5
    assert worst(trace.average, reference.average) < 1e-5
    assert max(reference.norms) > 0.5  # clipping was active


@pytest.mark.dist
@pytest.mark.parametrize("router", ROUTERS)
def test_zero3_on_two_ranks_equals_plain_torch(
    router: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    assert_same(on_two_ranks[f"{router} plain"], with_plain_torch(make(router)))
    few = with_plain_torch(make(router), FEW)
    for schedule in SCHEDULES_OF[router][1:]:  # they have equal gradients, see tests/test_rollout.py
        assert_same(on_two_ranks[f"{router} {schedule}"], few)


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["plain", "two_pass"])
def test_zero2_on_two_ranks_equals_plain_torch(
    schedule: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    assert_same(on_two_ranks[f"zero2 {schedule}"], with_plain_torch(make("diffmoe"), FEW))


@pytest.mark.dist
def test_one_rank_and_half_precision(make: Callable[..., RunConfig]) -> None:
    half = {"train": {"precision": "bf16"}}
    cases = {
        "alone": Case(make("diffmoe"), steps=FEW),
        "zero3 bf16": Case(make("diffmoe", **half), steps=FEW),
        "zero2 bf16": Case(make("diffmoe", "two_pass", **half), 2, FEW),
    }
    traces = run_ranks(with_engine, 1, cases)[0]
    reference = with_plain_torch(make("diffmoe"), FEW)
    assert_same(traces["alone"], reference)
    for name in ("zero3 bf16", "zero2 bf16"):
        losses = traces[name].losses
        assert max(abs(a - b) for a, b in zip(losses, reference.losses, strict=True)) < 0.05
        assert all(value.dtype == torch.float32 for value in traces[name].weights.values())


def traffic(world: World, run: RunConfig) -> tuple[int, list[dict[str, list[int]]]]:
    """Sizes of the model, and of every gather and reduction in each of three steps."""
    plan = plan_for(run, world)
    plan.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema = ShardEma(engine, 0.9)
    steps: list[dict[str, list[int]]] = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(deepspeed.comm.comm.cdb, name, counted(name, steps))
    for step, items in enumerate(items_of(plan, world, 3)):
        steps.append({})
        train_step(engine, objective, ema, items, step, with_routing=False)
    return engine.num_parameters, steps


def counted(name: str, steps: list[dict[str, list[int]]]) -> Callable[..., object]:
    collective = getattr(deepspeed.comm.comm.cdb, name)

    def call(*args: object, **kwargs: object) -> object:
        sizes = [value.numel() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        steps[-1].setdefault(name, []).append(max(sizes))
        return collective(*args, **kwargs)

    return call


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["plain", "recompute"])
def test_a_plain_rollout_gathers_and_reduces_the_model_once(schedule: str, make: Callable[..., RunConfig]) -> None:
    size, steps = run_ranks(traffic, 2, make("diffmoe", schedule))[0]
    for step in steps[1:]:  # the first one records the order of use
        assert sum(step["all_gather_into_tensor"]) == size
        assert sum(step["reduce_scatter_tensor"]) == size


def infinite_gradient(world: World, run: RunConfig, stage: int) -> tuple[str, bool]:
    """A loss that is finite with a gradient that is not."""
    engine = Engine(torch.nn.Linear(4, 4), run, plan_for(run, world, stage).ds_config, world)
    before = [part.detach().clone() for part in engine.master_partitions()]
    engine.backward(engine(torch.ones(2, 4)).sum() * (torch.inf if world.rank == 0 else 1.0), last=True)
    try:
        engine.step(0.1)
    except TrainingError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, engine.master_partitions(), strict=True))
        return str(error), same
    return "no error", False


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_that_is_not_finite_stops_all_ranks_before_the_update(
    stage: int, make: Callable[..., RunConfig]
) -> None:
    answers = run_ranks(infinite_gradient, 2, make("dense"), stage)
    assert [unchanged for _, unchanged in answers] == [True, True]
    assert all("gradient norm is not finite" in message for message, _ in answers)


def test_limits_below_the_model_size_are_named() -> None:
    zero = {"stage": 3, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 10_000}
    (message,) = regather_warnings({"zero_optimization": zero}, 5000)
    assert "stage3_max_live_parameters is 1000" in message
    assert "5000" in message
    assert regather_warnings({"zero_optimization": zero | {"stage": 2}}, 5000) == []


def test_apex_that_is_not_there_names_the_trap() -> None:
    with pytest.raises(ConfigError, match="PyPI's 'apex' is an unrelated package"):
        optimizer_factory(OptimConfig(impl="apex"), torch.device("cpu"))


def test_auto_on_the_host_is_torch_adamw() -> None:
    optim = OptimConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    optimizer = optimizer_factory(optim, torch.device("cpu"))([torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == 0.1
