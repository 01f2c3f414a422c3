"""Every schedule under ZeRO-3 on two ranks: the numbers of `plain` on one process, the traffic of one plain step."""

from typing import NamedTuple

import pytest
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import train_step
from sharpmoe.train.terms import LossTerms
from tests.counting import CollectiveCounter
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.parallel.reference import Trace, items_of, watched, with_plain_torch
from tests.train.setting import make_run, plan_for, stirred_model

STEPS = 3  # the first records the order of use, the second may meet what the first left gathered
ZERO = ("all_gather", "reduce_scatter")
SCHEDULES: dict[str, dict[str, object]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "two_pass, merged": {"schedule": "two_pass", "merged_steps": 2},
    "hybrid": {"schedule": "hybrid", "kept_steps": 2},
    "segments": {"schedule": "segments", "segment_steps": 1},
}
LAYOUTS = {"ep 1": 1, "ep 2": 2}
Key = tuple[str, str]


class Outcome(NamedTuple):
    """What a few steps showed."""

    losses: list[float]
    gradients: dict[str, Tensor]  # of the first step
    sizes: dict[str, int]  # bytes of all messages of the last step, by kind; experts may have a group of their own
    sent: int  # bytes that left this rank in the last step, without the exchange of tokens
    reduced: list[int]  # bytes of every all-reduce of the last step
    figures: int  # bytes of what every step averages over ranks: loss terms, and the thresholds of all layers
    parameters: int  # bytes of the part of the model that is partitioned: all of it, or all but the experts


def train_and_count(world: World, runs: dict[Key, RunConfig]) -> dict[Key, Outcome]:
    return {key: outcome(world, run) for key, run in runs.items()}


def outcome(world: World, run: RunConfig) -> Outcome:
    plan = plan_for(run, world)
    plan.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema, gradients, losses = ShardEma(engine, 0.9), dict[str, Tensor](), []
    for step, items in enumerate(items_of(plan, world, STEPS)):
        watching = watched(engine, objective, gradients)
        with CollectiveCounter() as counter:
            losses.append(train_step(watching, objective, ema, items, step, with_routing=False).losses["total"])
    sizes = {
        name: sum(call.size for call in counter.calls if call.name == name and call.group_size > 1) for name in ZERO
    }
    sent = counter.sent() - counter.sent("all_to_all")
    reduced = [call.size for call in counter.calls if call.name == "all_reduce" and call.group_size > 1]
    figures = len(LossTerms._fields) + sum(layer.expert_threshold.numel() for layer in objective.model.moe_layers())
    shared = [p for name, p in objective.named_parameters() if run.parallel.ep_size == 1 or ".experts." not in name]
    parameters = sum(p.ds_numel for p in shared)
    return Outcome(losses, gradients, sizes, sent, reduced, 8 * figures, 4 * parameters)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, RunConfig]:
    """DiffMoE, T = 3, two micro-batches of two images on each rank; and one plain denoising step of the same."""
    shards, output = make_shards(tmp_path_factory.mktemp("shards") / "shapes"), tmp_path_factory.mktemp("runs")
    made = {}
    for layout, ep_size in LAYOUTS.items():
        sections = {"optim": {"name": "sgd", "lr": 0.05}, "parallel": {"ep_size": ep_size}}
        for name, fields in SCHEDULES.items():
            rollout = {"num_steps": 3} | fields
            made[name, layout] = make_run(shards, output, rollout=rollout, train={"micro_batch": 2}, **sections)
        made["one step", layout] = make_run(shards, output, stage="pretrain", **sections)
    return made


@pytest.fixture(scope="module")
def outcomes(runs: dict[Key, RunConfig]) -> dict[Key, Outcome]:
    return run_ranks(train_and_count, 2, runs, timeout=400)[0]


@pytest.fixture(scope="module")
def references(runs: dict[Key, RunConfig]) -> dict[str, Trace]:
    return {name: with_plain_torch(runs[name, "ep 1"], STEPS) for name in ("plain", "segments")}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_gradients_equal_one_process(
    name: str, layout: str, outcomes: dict[Key, Outcome], references: dict[str, Trace]
) -> None:
    ours, reference = outcomes[name, layout], references["segments" if name == "segments" else "plain"]
    assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) < 1e-5
    for key, gradient in reference.gradients.items():
        assert float((ours.gradients[key] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()) + 1e-9, key


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rollout_gathers_and_reduces_the_model_once(name: str, layout: str, outcomes: dict[Key, Outcome]) -> None:
    ours, one_step = outcomes[name, layout], outcomes["one step", layout]
    assert ours.sizes == dict.fromkeys(ZERO, ours.parameters)
    assert ours.sent <= 1.1 * one_step.sent


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_figures_of_all_layers_and_steps_go_in_one_all_reduce(
    name: str, layout: str, outcomes: dict[Key, Outcome]
) -> None:
    """The engine's own reductions, of norms and flags, are single numbers."""
    ours = outcomes[name, layout]
    assert [size for size in ours.reduced if size > 16] == [ours.figures]
