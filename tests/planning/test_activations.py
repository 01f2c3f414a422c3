"""What a rollout keeps, on tensors without storage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.families import rows_of_call
from sharpmoe.moe.thresholds import TrajectoryPool
from sharpmoe.planning import activations as planned_activations
from sharpmoe.planning.activations import (
    Activations,
    GraphBytes,
    SampleTokens,
    _count,
    _LinearBytes,
    _meter,
    count_activations,
)
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import all_schedules, schedule_of, with_schedule
from sharpmoe.train.trajectories import draw_trajectories
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, ToySamples
from tests.train.setting import make_run, stirred_model

TOKENS = SampleTokens(image=16, text=4)


def run_with(router: str = "diffmoe", **model: Any) -> RunConfig:
    return make_run(Path("shards"), Path("runs"), router, rollout={"num_steps": 6}, model=model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "model"),
    [("diffmoe", {"depth": 8}), ("ec", {"depth": 7}), ("tc", {"depth": 8, "moe_every": 1, "dense_first": 2})],
)
def test_two_shallow_models_give_a_deep_one(router: str, model: dict[str, Any]) -> None:
    run = run_with(router, **model)
    for found, counted in zip(count_activations(run, 2, TOKENS), _count(run, 2, TOKENS), strict=True):
        assert found == (counted if isinstance(counted, _LinearBytes) else pytest.approx(counted, rel=0.01))


@pytest.mark.slow
def test_a_graph_grows_with_the_batch_and_the_precision() -> None:
    one, two = (count_activations(run_with(), batch, TOKENS) for batch in (2, 4))
    assert two.kept.per_step == pytest.approx(2 * one.kept.per_step, rel=0.02)
    half = count_activations(
        run_with().model_copy(update={"train": run_with().train.model_copy(update={"precision": "bf16"})}), 2, TOKENS
    )
    assert 0.5 < half.kept.per_step / one.kept.per_step < 0.8  # routing stays in float32


def test_what_each_schedule_keeps() -> None:
    """T = 6; a graph of n steps is 10 + 100 n, and a step that is run again leaves 5."""
    activations = Activations(_LinearBytes(10, 100), _LinearBytes(10, 20), 5, 80)
    schedules = [schedule_of(run) for run in all_schedules(run_with())]
    kept = {schedule.name: [graph.most for graph in activations.of(schedule)] for schedule in schedules}
    assert kept == {
        "plain": [610],
        "checkpoint": [210],
        "two_pass": 6 * [110 + 30],
        "hybrid, kept_steps 3": [310 + 15, *(3 * [110 + 15])],
        "segments, segment_steps 3": [310],
    }
    merged = schedule_of(with_schedule(run_with(), schedule="two_pass", merged_steps=4))
    assert merged.name == "two_pass, merged_steps 4"
    assert activations.of(merged) == (GraphBytes(440, 410, 1), GraphBytes(240, 210, 1))
    again = schedule_of(with_schedule(run_with(), schedule="segments", segment_steps=2, kept_steps=1))
    assert [graph.most for graph in activations.of(again)] == 2 * [110 + 5]


def test_without_a_routing_loss_steps_are_trained_one_by_one() -> None:
    activations = Activations(_LinearBytes(10, 100), _LinearBytes(10, 20), 5, 80)
    for fields in ({"schedule": "two_pass"}, {"schedule": "hybrid", "kept_steps": 3}):
        schedule = schedule_of(with_schedule(run_with("tc"), **fields))
        assert [graph.most for graph in activations.of(schedule)] == 6 * [110]


@pytest.mark.parametrize(("router", "rows"), [("tc", 64), ("ec", 64), ("diffmoe", 64), ("race", 64)])
def test_rows_of_a_call(router: str, rows: int) -> None:
    assert rows_of_call(run_with(router).model, 4, 16) == rows
    assert rows_of_call(run_with(router, capacity=2.0, top_k=2).model, 4, 16) == 2 * rows


@pytest.mark.slow
@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_rows_that_vary_over_a_trajectory_are_planned_for(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutoffs by which every expert takes every token: a real step keeps what a plan for such steps says."""
    widths = {"text_width": TEXT_WIDTH, "pooled_width": POOLED_WIDTH}
    run = make_run(Path("shards"), Path("runs"), router, rollout={"num_steps": 2, "pool": "trajectory"}, model=widths)
    by_rule = count_activations(with_schedule(run, pool="step"), 2, SampleTokens(16, TEXT_LENGTH))
    monkeypatch.setattr(planned_activations, "FULLEST_STEP", run.model.num_experts / run.model.capacity)
    plan = count_activations(run, 2, SampleTokens(16, TEXT_LENGTH))

    empty = (torch.zeros(TEXT_LENGTH, TEXT_WIDTH), torch.ones(TEXT_LENGTH, dtype=torch.bool), torch.zeros(POOLED_WIDTH))
    (item,) = draw_trajectories([ToySamples().batch([0, 1])], empty, run, torch.device("cpu"))
    objective = Objective(stirred_model(run), run).train()
    held: list[int] = []
    candidates = TrajectoryPool.candidates

    def weighed(pool: TrajectoryPool) -> tuple[torch.Tensor, torch.Tensor]:
        scores = sum(scores.nbytes for scores in pool._scores)
        held.append(2 * scores + sum(logits.nbytes for logits in pool._capacity))  # one copy of the scores is ranked
        return candidates(pool)

    monkeypatch.setattr(TrajectoryPool, "candidates", weighed)
    meter = _meter(objective, item)
    with meter.on_saved():
        cutoffs = torch.full((run.model.num_moe_layers, run.model.num_experts), -torch.inf)
        meter.add(objective(StepRequest((item,), cutoffs=cutoffs)))
    assert plan.kept.at(2) == pytest.approx(meter.total, rel=0.05)
    assert plan.kept.at(2) > 1.2 * by_rule.kept.at(2)
    assert held == [plan.pool]
    assert by_rule.pool == 0


@pytest.mark.slow
def test_the_fullest_step_of_a_trajectory_takes_more() -> None:
    """Of a family with a pool over calls only, in every schedule, and of one recomputed block still more."""
    for router, varies in (("diffmoe", True), ("ec", False)):
        step = run_with(router, depth=2)
        trajectory = with_schedule(step, pool="trajectory")
        one, other = (count_activations(run, 2, TOKENS) for run in (step, trajectory))
        assert (other.kept.per_step > one.kept.per_step) is varies
        assert (other.block > one.block) is varies
        for run in all_schedules(trajectory):
            more = [b.most > a.most for a, b in zip(one.of(schedule_of(run)), other.of(schedule_of(run)), strict=True)]
            assert set(more) == {varies}
