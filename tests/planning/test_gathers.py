"""When ZeRO-3 gathers, on numbers alone; tests/budget/test_counted.py compares with real runs."""

from pathlib import Path
from typing import Any

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning import gathers as gathers_module
from sharpmoe.planning.gathers import count_gathers
from sharpmoe.planning.layout import Layout, parts_of
from sharpmoe.train.rollout_schedules import schedule_of
from tests.train.setting import make_run

ZERO = ZeroSettings(3, 20_000, 5_000, 500, 10**9, 10**9, 10**9, True, False, True, True, 4, 4, 4, False, False)
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
    layout = Layout(world, run.parallel.ep_size, ZERO._replace(**zero), 4, accumulation)
    parts = parts_of(run, layout.world, layout.ep_size)
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
    assert peak == sum(part.numel for part in parts_of(run_with(), 4, 1))


def test_limits_below_the_model_gather_it_again_and_keep_copies_of_experts() -> None:
    size = sum(part.numel for part in parts_of(run_with(), 4, 1))
    times, peak = gathers(run_with(), max_reuse=size // 20)
    assert max(times.values()) >= T
    assert peak > size  # a graph holds the experts that it was computed with
    for name in ("checkpoint", "two_pass"):
        times, lower = gathers(run_with(**SCHEDULES[name]), max_reuse=size // 20)
        assert max(times.values()) >= T
        assert lower <= size


@pytest.mark.parametrize("name", SCHEDULES)
def test_many_micro_batches_are_told_from_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(part.numel for part in parts_of(run_with(), 4, 1))
    limits = {"max_reuse": size // 3, "max_live": size // 2}
    told = gathers(run_with(**SCHEDULES[name]), 7, **limits)
    monkeypatch.setattr(gathers_module, "_FOLLOWED", 7)
    assert told == gathers(run_with(**SCHEDULES[name]), 7, **limits)


def test_experts_that_no_other_rank_shares_take_no_memory_when_gathered() -> None:
    run = make_run(Path("shards"), Path("runs"), "diffmoe", parallel={"ep_size": 4})
    parts = parts_of(run, 4, 4)
    dense = sum(part.numel for part in parts if not part.is_expert)
    assert {part.ranks for part in parts if part.is_expert} == {1}
    assert gathers(run)[1] == dense
