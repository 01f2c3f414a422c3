"""What a rollout keeps, on tensors without storage."""

from pathlib import Path
from typing import Any

import pytest

from sharpmoe.budget.activations import Activations, Linear, _count, measure, rows_per_call
from sharpmoe.budget.schedules import EngineCall, Schedule, schedules_of
from sharpmoe.config import RunConfig
from tests.train.setting import make_run


def run_with(router: str = "diffmoe", **model: Any) -> RunConfig:
    return make_run(Path("shards"), Path("runs"), router, rollout={"num_steps": 6}, model=model)


@pytest.mark.parametrize(
    ("router", "model"),
    [("diffmoe", {"depth": 8}), ("ec", {"depth": 7}), ("tc", {"depth": 8, "moe_every": 1, "dense_first": 2})],
)
def test_two_shallow_models_tell_of_a_deep_one(router: str, model: dict[str, Any]) -> None:
    run = run_with(router, **model)
    for told, counted in zip(measure(run, 2, 4), _count(run, 2, 4), strict=True):
        assert told == (counted if isinstance(counted, Linear) else pytest.approx(counted, rel=0.01))


def test_a_graph_grows_with_the_batch_and_the_precision() -> None:
    one, two = (measure(run_with(), batch, 4) for batch in (2, 4))
    assert two.kept.per_step == pytest.approx(2 * one.kept.per_step, rel=0.02)
    half = measure(
        run_with().model_copy(update={"train": run_with().train.model_copy(update={"precision": "bf16"})}), 2, 4
    )
    assert 0.5 < half.kept.per_step / one.kept.per_step < 0.8  # routing stays in float32


def test_what_each_schedule_keeps() -> None:
    activations = Activations(Linear(10, 100), Linear(10, 20), Linear(0, 5), 80)
    kept = {schedule.name: activations.of(schedule, 1).most for schedule in schedules_of(run_with())}
    assert kept == {
        "plain": 610,
        "plain, checkpoint_blocks": 210,
        "two_pass": 140,
        "two_pass, segment_steps 3": 140,
    }
    assert activations.of(Schedule("plain", (EngineCall(6, True),)), 3).most == 610 + 2 * 30  # records wait
    assert activations.of(Schedule("two_pass", (EngineCall(1, True),) * 6), 1).most == 110 + 30


@pytest.mark.parametrize(("router", "rows"), [("tc", 64), ("ec", 64), ("diffmoe", 64), ("race", 64)])
def test_rows_of_a_call(router: str, rows: int) -> None:
    assert rows_per_call(run_with(router), 4) == rows
    assert rows_per_call(run_with(router, capacity=2.0, top_k=2), 4) == 2 * rows
