"""When ZeRO-3 gathers, on numbers alone; tests/planning/test_counted.py compares with real runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning import gathers as gathers_module
from sharpmoe.planning.coordinator import version_notes
from sharpmoe.planning.gathers import _upper_bound, count_gathers
from sharpmoe.planning.layout import RankLayout, rank_parameters
from sharpmoe.train.rollout_schedules import schedule_of
from tests.train.setting import make_run

ZERO = ZeroSettings(
    stage=3,
    reduce_bucket=20_000,
    prefetch_bucket=5_000,
    persistence=500,
    max_live=10**9,
    max_reuse=10**9,
    sub_group=10**9,
    contiguous=True,
    double_buffer=False,
    reduce_scatter=True,
    whole_buckets=True,
    compute_bytes=4,
    gradient_bytes=4,
    wire_bytes=4,
    host_optimizer=False,
    host_weights=False,
)
T = 6
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "merged": {"schedule": "two_pass", "merged_steps": 2},
    "hybrid": {"schedule": "hybrid", "kept_steps": 2},
    "segments": {"schedule": "segments", "segment_steps": 2},
}


def run_with(**rollout: Any) -> RunConfig:
    return make_run(Path("shards"), Path("runs"), "diffmoe", rollout={"num_steps": T} | rollout)


def gathers(run: RunConfig, accumulation: int = 1, world: int = 4, **zero: int) -> tuple[dict[str, int], int]:
    """How often each parameter that is not resident is gathered, and the peak in elements."""
    layout = RankLayout(world, run.parallel.ep_size, replace(ZERO, **zero), 4, accumulation)
    parts = rank_parameters(run, layout.world, layout.ep_size)
    found = count_gathers(run, parts, schedule_of(run), layout)
    resident = {part.name for part in parts if part.numel <= layout.zero.persistence}
    times = {part.name: n for part, n in zip(parts, found.times, strict=True)}
    assert {times[name] for name in resident} == {1}  # after the update
    return {name: n for name, n in times.items() if name not in resident}, found.peak


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_optimizer_step_gathers_once(name: str, accumulation: int) -> None:
    times, peak = gathers(run_with(**SCHEDULES[name]), accumulation)
    assert set(times.values()) == {1}
    assert peak == sum(part.numel for part in rank_parameters(run_with(), 4, 1))


def test_limits_below_the_model_gather_it_again_and_keep_copies_of_experts() -> None:
    size = sum(part.numel for part in rank_parameters(run_with(), 4, 1))
    times, peak = gathers(run_with(), max_reuse=size // 20)
    assert max(times.values()) >= T
    assert peak > size  # a graph holds the experts that it was computed with
    for name in ("checkpoint", "two_pass"):
        times, lower = gathers(run_with(**SCHEDULES[name]), max_reuse=size // 20)
        assert max(times.values()) >= T
        assert lower <= size


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_micro_batches_follow_from_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(part.numel for part in rank_parameters(run_with(), 4, 1))
    limits = {"max_reuse": size // 3, "max_live": size // 2}
    found = gathers(run_with(**SCHEDULES[name]), 7, **limits)
    monkeypatch.setattr(gathers_module, "_FOLLOWED", 7)
    assert found == gathers(run_with(**SCHEDULES[name]), 7, **limits)


def test_experts_that_no_other_rank_shares_take_no_memory_when_gathered() -> None:
    run = make_run(Path("shards"), Path("runs"), "diffmoe", parallel={"ep_size": 4})
    parts = rank_parameters(run, 4, 4)
    dense = sum(part.numel for part in parts if not part.is_expert)
    assert {part.ranks for part in parts if part.is_expert} == {1}
    assert gathers(run)[1] == dense


@pytest.mark.parametrize("limits", [{}, {"max_reuse": 3_000}, {"max_reuse": 20_000, "max_live": 10_000}])
@pytest.mark.parametrize("name", SCHEDULES)
def test_another_version_is_bounded_from_above(name: str, limits: dict[str, int]) -> None:
    run = run_with(**SCHEDULES[name])
    layout = RankLayout(4, 1, replace(ZERO, **limits), 4, 2)
    parts = rank_parameters(run, 4, 1)
    counted, bound = (count(run, parts, schedule_of(run), layout) for count in (count_gathers, _upper_bound))
    assert all(most >= n for most, n in zip(bound.times, counted.times, strict=True))
    assert bound.peak >= counted.peak
    assert bound.arriving >= counted.arriving


def test_a_plan_names_a_version_that_is_not_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_notes() == ()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.0")
    assert version_notes() == ("gathers of ZeRO-3 are counted for DeepSpeed 0.19.8; for 0.20.0 they are upper bounds",)
    run, layout = run_with(), RankLayout(4, 1, ZERO, 4, 1)
    parts = rank_parameters(run, 4, 1)
    assert count_gathers(run, parts, schedule_of(run), layout) == _upper_bound(run, parts, schedule_of(run), layout)
