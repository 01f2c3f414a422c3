"""`rollout.schedule: auto` takes the cheapest exact schedule that fits."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from sharpmoe.config import RolloutConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.planning.choice import candidates, cheapest, forwards
from sharpmoe.train.rollout_schedules import check_schedule
from tests.train.setting import make_run


def a_run(router: str = "diffmoe", rollout: dict[str, object] | None = None, **sections: object) -> RunConfig:
    steps = {"num_steps": 10, "schedule": "auto"} | (rollout or {})
    return make_run(Path("none"), Path("none"), router, rollout=steps, **sections)


def graphs(run: RunConfig) -> float:
    """A memory plan: the graphs that a schedule keeps, of one GiB; blocks' inputs are a twentieth."""
    rollout = run.rollout
    kept = {"plain": rollout.num_steps, "hybrid": rollout.kept_steps or 0, "two_pass": 1}
    return 2**30 * kept.get(rollout.schedule, rollout.num_steps / 20)


def named(run: RunConfig, room: float) -> tuple[str, int | None]:
    chosen = cheapest(run, graphs, room * 2**30)
    chosen.check()
    return chosen.run.rollout.schedule, chosen.run.rollout.kept_steps


def test_the_cheapest_that_fits() -> None:
    assert [named(a_run(), room) for room in (10, 9.5, 4.2, 1, 0.5)] == [
        ("plain", None), ("hybrid", 9), ("hybrid", 4), ("hybrid", 1), ("checkpoint", None)
    ]  # fmt: skip
    assert [named(a_run("tc"), room)[0] for room in (10, 9, 0.6)] == ["plain", "two_pass", "checkpoint"]
    with pytest.raises(ConfigError, match=r"no schedule that fits 0\.4 GiB, the smallest takes 0\.5"):
        named(a_run(), 0.4)
    smallest = cheapest(a_run(), graphs, 0)
    assert (smallest.run.rollout.schedule, smallest.fits) == ("checkpoint", False)


def test_costs_rise_along_the_candidates() -> None:
    costs = [forwards(run) for run in candidates(a_run())]
    assert costs == [30, *range(31, 40), 40]
    segments = a_run(rollout={"schedule": "segments", "segment_steps": 5})
    assert forwards(segments) == 20
    assert forwards(a_run(rollout={"schedule": "segments", "segment_steps": 5, "kept_steps": 0})) == 25
    assert forwards(a_run(rollout={"schedule": "two_pass"})) == 40
    assert forwards(a_run("tc", rollout={"schedule": "two_pass"})) == 30
    assert [run.rollout.schedule for run in candidates(a_run(stage="pretrain"))] == ["plain", "checkpoint"]


def test_what_cannot_run_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.schedule is auto"):
        check_schedule(a_run(), 4)
    merged = {"schedule": "two_pass", "merged_steps": 3}
    with pytest.raises(ConfigError, match="promoe_tc compares the tokens of a whole call"):
        check_schedule(a_run("promoe_tc", merged, model={"conditioning": "class"}), 4)
    uneven = a_run("diffmoe", merged, model={"num_experts": 3})
    with pytest.raises(ConfigError, match=r"16 tokens \* capacity 1\.0 do not split evenly over 3 experts"):
        check_schedule(uneven, 1)
    check_schedule(uneven, 3)
    check_schedule(a_run("ec", merged, model={"num_experts": 3}), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "hybrid"}, r"hybrid needs kept_steps from 1 to num_steps \(10\)"),
        ({"schedule": "hybrid", "kept_steps": 11}, r"hybrid needs kept_steps from 1 to num_steps \(10\)"),
        ({"schedule": "segments", "segment_steps": 3}, r"segment_steps \(3\) must divide num_steps \(10\)"),
        ({"schedule": "segments", "segment_steps": 2, "kept_steps": 3}, "must be at most segment_steps"),
        ({"schedule": "plain", "merged_steps": 2}, r"merged_steps needs schedule: two_pass \| hybrid \| segments"),
        ({"schedule": "two_pass", "segment_steps": 2}, "segment_steps needs schedule: segments"),
        ({"schedule": "two_pass", "kept_steps": 2}, r"kept_steps needs schedule: hybrid \| segments"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutConfig(num_steps=10, **fields)
