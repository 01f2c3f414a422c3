"""The plan against what real ZeRO runs on gloo ranks hold, keep and send."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.activations import SampleTokens, count_activations
from sharpmoe.planning.estimate import Estimate, Planner
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.planning.real import Case, Counted, count
from tests.selection import selected, sweep
from tests.train.setting import make_run

ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 20_000,
    "stage3_prefetch_bucket_size": 5_000,
    "stage3_param_persistence_threshold": 500,
}
SHORT = ZERO3 | {"stage3_max_reuse_distance": 30_000}  # less than the model: gathered again at every rollout step
ZERO2 = {"stage": 2, "reduce_bucket_size": 20_000, "overlap_comm": False}
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "merged": {"schedule": "two_pass", "merged_steps": 2},
    "hybrid": {"schedule": "hybrid", "kept_steps": 2},
    "segments": {"schedule": "segments", "segment_steps": 1},
}
# ranks, ep, ZeRO, router, schedule, precision
CASES: dict[str, tuple[int, int, dict[str, Any], str, str, str]] = {
    "zero3": (2, 1, ZERO3, "diffmoe", "plain", "fp32"),
    "zero3 checkpoint": (2, 1, ZERO3, "ec", "checkpoint", "bf16"),
    "zero3 two_pass": (2, 1, ZERO3, "diffmoe", "two_pass", "fp32"),
    "zero3 merged": (2, 1, ZERO3, "diffmoe", "merged", "fp32"),
    "zero3 hybrid": (2, 1, ZERO3, "ec", "hybrid", "bf16"),
    "zero3 one by one": (2, 1, ZERO3, "tc", "two_pass", "fp32"),
    "zero3 short": (2, 1, SHORT, "diffmoe", "plain", "fp32"),
    "zero3 short two_pass": (2, 1, SHORT, "ec", "two_pass", "fp32"),
    "zero3 short hybrid": (2, 1, SHORT, "diffmoe", "hybrid", "fp32"),
    "zero2": (2, 1, ZERO2, "ec", "plain", "fp32"),
    "zero2 segments": (2, 1, ZERO2, "diffmoe", "segments", "bf16"),
    "ep 2": (2, 2, ZERO3, "diffmoe", "plain", "bf16"),
    "4 zero3": (4, 1, ZERO3, "ec", "plain", "bf16"),
    "4 ep 2": (4, 2, ZERO3, "diffmoe", "two_pass", "fp32"),
    "4 zero2 ep 2": (4, 2, ZERO2, "diffmoe", "plain", "bf16"),
    "zero3 routers": (2, 1, ZERO3, "diffmoe", "plain", "fp32"),
    "zero3 frozen experts": (2, 1, ZERO3, "diffmoe", "plain", "bf16"),
    "zero2 routers": (2, 1, ZERO2, "ec", "plain", "fp32"),
    "4 ep 2 experts": (4, 2, ZERO3, "diffmoe", "two_pass", "fp32"),
}
TRAINED: dict[str, dict[str, Any]] = {  # of the cases in which something is frozen
    "zero3 routers": {"trainable": ["saliency_router", "gate"]},
    "zero3 frozen experts": {"frozen": ["experts"]},
    "zero2 routers": {"trainable": ["saliency_router"]},
    "4 ep 2 experts": {"trainable": ["moe.experts"]},
}
FIGURES = ("weights", "masters", "gradients", "optimizer", "ema", "gathered", "gathers", "reductions", "exchanges")
FEW = 4096  # bytes: counters, figures of the step

USUAL = ("zero3 merged", "zero3 short hybrid", "zero2 segments", "ep 2", "zero3 routers")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("counted")
    make_shards(root / "shapes")
    return root


def case_of(name: str, folder: Path) -> Case:
    ranks, ep_size, zero, router, schedule, precision = CASES[name]
    run = make_run(
        folder / "shapes",
        folder,
        router,
        model={"width": 48, "depth": 2},
        rollout={"num_steps": 3} | SCHEDULES[schedule],
        train={"global_batch": 8 * ranks, "micro_batch": 4, "precision": precision} | TRAINED.get(name, {}),
        parallel={"ep_size": ep_size},
    )
    return Case(run, zero)


@pytest.fixture(scope="module")
def counted(folder: Path, request: pytest.FixtureRequest) -> dict[str, Counted]:
    found: dict[str, Counted] = {}
    for ranks in (2, 4):
        names = [name for name in selected(request, "name") if CASES[name][0] == ranks]
        if names:
            cases = {name: case_of(name, folder) for name in names}
            found |= run_ranks(count, ranks, cases, folder, timeout=500)[0]
    return found


@cache
def planned(name: str, folder: Path) -> tuple[Planner, Estimate]:
    case, ranks = case_of(name, folder), CASES[name][0]
    planner = Planner(case.run)
    layout = planner.layout(ranks, resolve_ds_config(folder / f"{name}-0.json", case.run, ranks))
    return planner, planner.budget(layout).own


@pytest.mark.parametrize("name", sweep(CASES, USUAL))
def test_what_a_rank_holds_and_sends(name: str, counted: dict[str, Counted], folder: Path) -> None:
    memory, traffic = planned(name, folder)[1][2:]
    plan = asdict(memory) | traffic._asdict()
    real = counted[name]._asdict()
    if name in TRAINED and real["exchanges"]:  # planned with a gradient for the tokens of every layer
        assert real["exchanges"] < plan["exchanges"] < 1.3 * real["exchanges"]
        plan["exchanges"] = real["exchanges"]
    if CASES[name][2] is SHORT:  # the plan counts the copies of experts that graphs hold: see the peak
        plan["gathered"] = real["gathered"]
    wrong = {key: (plan[key], real[key]) for key in FIGURES if abs(plan[key] - real[key]) > 0.05 * real[key] + FEW}
    assert wrong == {}
    assert real["weights"] > 10 * FEW
    assert (real["exchanges"] > 0) == (CASES[name][1] > 1)


KEPT = [name for name in CASES if CASES[name][2] is not SHORT and name not in TRAINED]  # frozen: an upper bound


@pytest.mark.parametrize("name", sweep(KEPT, USUAL))
def test_what_a_rollout_keeps(name: str, counted: dict[str, Counted], folder: Path) -> None:
    """Between the forward and the backward: the last graph of the last micro-batch, and the sum of what came before."""
    planner, estimate = planned(name, folder)
    last, activations = estimate.schedule.passes[-1], count_activations(planner.run, 4, SampleTokens(image=16, text=4))
    plan = (activations.inputs if last.recompute else activations.kept).at(last.num_trained) + estimate.memory.sums
    if last.recompute:  # what torch's checkpoint keeps of the host's random numbers, on a host a figure of its own
        plan += last.num_trained * planner.run.model.depth * torch.get_rng_state().numel()
    assert estimate.memory.sums > 0  # two micro-batches
    assert abs(plan - counted[name].kept) < 0.05 * counted[name].kept


@pytest.mark.parametrize("name", sweep(CASES, USUAL))
def test_the_peak_of_a_step(name: str, counted: dict[str, Counted], folder: Path) -> None:
    """All that is allocated in a step, also what no line of the plan names; it may be too high rather than too low."""
    memory = planned(name, folder)[1].memory
    there_before = counted[name].bucket if CASES[name][2]["stage"] == 3 else -memory.gradients
    assert 0.95 < (memory.backward - there_before) / counted[name].peak < 1.3
