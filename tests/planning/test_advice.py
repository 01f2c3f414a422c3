"""What a plan says could be faster: ZeRO-2 where it fits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sharpmoe.config import RunConfig
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.advice import RESERVE, advise, gather_notes, pool_notes, stage_notes
from sharpmoe.planning.estimate import Estimate, Planner
from sharpmoe.planning.layout import RankLayout
from sharpmoe.train.rollout_schedules import schedule_of
from tests.train.setting import CONFIGS, make_run

GIB = 2**30
RANKS, STEPS = 4, 3


@pytest.fixture(scope="module")
def planner() -> Planner:
    batch = {"global_batch": 8, "micro_batch": 1}
    return Planner(make_run(Path("none"), Path("none"), rollout={"num_steps": STEPS}, train=batch))


def layout_of(run: RunConfig, stage: int) -> RankLayout:
    return Planner(run).layout(RANKS, resolve_ds_config(CONFIGS / f"zero{stage}.json", run, RANKS))


def estimated(planner: Planner, layout: RankLayout) -> Estimate:
    return planner.estimate(layout, schedule_of(planner.run))


def saved(note: str) -> tuple[int, int]:
    """Gathers, and forwards and backwards, that a note says are saved."""
    found = re.search(r"saves (\d+) gathers .* in (\d+) forwards and backwards; a rank sends .* GiB instead of", note)
    assert found is not None, note
    return int(found[1]), int(found[2])


def test_zero2_is_named_where_it_fits(planner: Planner) -> None:
    """Its peak is that of the shipped ZeRO-2 file; the gathers are those that the plan counts."""
    layout = layout_of(planner.run, 3)
    own = estimated(planner, layout)
    peak = estimated(planner, layout_of(planner.run, 2)).memory.peak / GIB
    (note,) = stage_notes(planner, own, 1.01 * peak / (1 - RESERVE))
    assert f"ZeRO-2 fits too, {peak:.2f} GiB of" in note
    units = 3 + planner.run.model.depth + 1  # embedders of patches, time and text, blocks, the final layer
    assert layout.accumulation == 2
    assert saved(note) == (units, 2 * STEPS * layout.accumulation)
    assert stage_notes(planner, own, 0.99 * peak / (1 - RESERVE)) == ()


def test_more_gathers_are_saved_where_limits_make_them_more(planner: Planner) -> None:
    layout = layout_of(planner.run, 3)
    tight = layout._replace(zero=replace(layout.zero, max_reuse=0, max_live=0, prefetch_bucket=0, persistence=0))
    (note,) = stage_notes(planner, estimated(planner, tight), 80)
    assert saved(note)[0] > STEPS * saved(stage_notes(planner, estimated(planner, layout), 80)[0])[0]


@pytest.mark.parametrize("ahead", [0, 5_000])
def test_gathers_are_named_with_what_it_takes_to_have_one(ahead: int, planner: Planner) -> None:
    """The setting of the note, planned: one gather, and the peak and bytes that the note says."""
    layout = layout_of(planner.run, 3)
    tight = layout._replace(zero=replace(layout.zero, max_reuse=0, max_live=0, prefetch_bucket=ahead, persistence=0))
    own = estimated(planner, tight)
    (note,) = gather_notes(planner, own, 80)
    found = re.search(r"gathered ([\d.]+) times per step .* with both at (\d+) it is gathered 1.0 times", note)
    assert found is not None, note
    assert float(found[1]) == pytest.approx(own.traffic.passes, abs=0.05)
    limits = {"max_reuse": int(found[2]), "max_live": int(found[2])}
    kept = estimated(planner, tight._replace(zero=replace(tight.zero, **limits)))
    assert kept.traffic.passes == pytest.approx(1, abs=0.05)
    assert f"{kept.memory.peak / GIB:.2f} instead of {own.memory.peak / GIB:.2f} GiB at the peak, which fits" in note
    assert gather_notes(planner, own, 0.99 * kept.memory.peak / GIB / (1 - RESERVE))[0].endswith("which does not fit")
    assert note in advise(planner, planner.budget(tight), 80).warnings
    assert gather_notes(planner, estimated(planner, layout), 80) == ()
    assert gather_notes(planner, estimated(planner, layout_of(planner.run, 2)), 80) == ()


def test_a_run_that_has_it_or_keeps_weights_on_the_host_is_told_nothing(planner: Planner) -> None:
    for layout in (layout_of(planner.run, 2), layout_of(planner.run, 3)):
        on_host = layout._replace(zero=replace(layout.zero, host_weights=layout.zero.stage == 3))
        assert stage_notes(planner, estimated(planner, on_host), 80) == ()


def test_a_plan_and_its_advice_say_the_same(planner: Planner) -> None:
    budget = planner.budget(layout_of(planner.run, 3))
    advice = advise(planner, budget, 80)
    assert advice.notes == stage_notes(planner, budget.own, 80)
    assert len(advice.notes) == 1
    assert advise(planner, budget, 1e-6).notes == ()  # it does not fit, and says what does


def test_a_pool_of_trajectories_is_planned_with_rows_that_vary(planner: Planner) -> None:
    rollout = {"num_steps": STEPS, "pool": "trajectory"}
    run = make_run(Path("none"), Path("none"), rollout=rollout, train={"global_batch": 8, "micro_batch": 1})
    varied = Planner(run)
    (note,) = pool_notes(run)
    assert "planned for 1.15 times their mean in a step and 1.35 times in one recomputed block" in note
    assert note.endswith("the bound is 4 times")  # all tokens for each of four experts
    budget = varied.budget(layout_of(run, 2))
    assert advise(varied, budget, 80).notes == advise(varied, budget, 1e-6).notes == (note,)
    assert budget.own.memory.activations > estimated(planner, layout_of(planner.run, 2)).memory.activations
    assert pool_notes(planner.run) == ()
