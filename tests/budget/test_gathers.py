"""When ZeRO-3 gathers, on numbers alone; tests/budget/test_counted.py compares with real runs."""

from pathlib import Path
from typing import Any

import pytest

from sharpmoe.budget.gathers import count_gathers
from sharpmoe.budget.layout import Layout, parts_of
from sharpmoe.budget.schedules import own_schedule
from sharpmoe.config import RunConfig
from sharpmoe.parallel.zero_settings import ZeroSettings
from tests.train.setting import make_run

ZERO = ZeroSettings(3, 20_000, 5_000, 500, 10**9, 10**9, 10**9, True, False, True, True, 4, 4, 4, False, False)
T = 6


def run_with(**rollout: Any) -> RunConfig:
    return make_run(Path("shards"), Path("runs"), "diffmoe", rollout={"num_steps": T} | rollout)


def gathers(run: RunConfig, accumulation: int = 1, world: int = 4, **zero: int) -> tuple[dict[str, int], int]:
    """How often each parameter that is not resident is gathered, and the peak in elements."""
    layout = Layout(world, run.parallel.ep_size, ZERO._replace(**zero), 4, accumulation)
    parts = parts_of(run, layout.world, layout.ep_size)
    found = count_gathers(run, parts, own_schedule(run), layout)
    resident = {part.name for part in parts if part.numel <= layout.zero.persistence}
    times = {part.name: n for part, n in zip(parts, found.times, strict=True)}
    if len(own_schedule(run).calls) == 1:
        assert {times[name] for name in resident} == {1}  # after the update; losing the order releases them too
    return {name: n for name, n in times.items() if name not in resident}, found.peak


@pytest.mark.parametrize("rollout", [{}, {"checkpoint_blocks": True}], ids=["plain", "recompute"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_rollout_in_one_call_gathers_once(rollout: dict[str, Any], accumulation: int) -> None:
    times, peak = gathers(run_with(**rollout), accumulation)
    assert set(times.values()) == {accumulation}
    assert peak == sum(part.numel for part in parts_of(run_with(), 4, 1))


def test_a_call_per_step_gathers_for_each_call_and_more_where_the_order_changes() -> None:
    """A first pass of T steps and T calls of one step: the order recorded by one is of no use to the other."""
    times, _ = gathers(run_with(schedule="two_pass"))
    blocks = {n for name, n in times.items() if name.startswith("blocks.")}
    assert blocks == {2 * T}
    fewer, _ = gathers(run_with(schedule="two_pass", segment_steps=2))
    assert max(fewer.values()) < min(blocks)


def test_limits_below_the_model_gather_it_again_and_keep_copies_of_experts() -> None:
    size = sum(part.numel for part in parts_of(run_with(), 4, 1))
    times, peak = gathers(run_with(), max_reuse=size // 20)
    assert max(times.values()) >= T
    assert peak > size  # a graph holds the experts that it was computed with
    _, recomputed = gathers(run_with(checkpoint_blocks=True), max_reuse=size // 20)
    assert recomputed <= size


def test_experts_that_no_other_rank_shares_take_no_memory_when_gathered() -> None:
    run = make_run(Path("shards"), Path("runs"), "diffmoe", parallel={"ep_size": 4})
    parts = parts_of(run, 4, 4)
    dense = sum(part.numel for part in parts if not part.is_expert)
    assert {part.ranks for part in parts if part.is_expert} == {1}
    assert gathers(run)[1] == dense
