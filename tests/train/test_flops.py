"""Counted FLOPs against the operators that run: every schedule, integers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sharpmoe.config import LoraConfig, RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.model.adapters import attach_adapters
from sharpmoe.model.trainable import freeze
from sharpmoe.train.flops import _named_peak, peak_tflops, rows_expected, step_flops
from sharpmoe.train.metrics import rows_taken
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import schedule_of
from sharpmoe.train.trajectories import draw_trajectories
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, ToySamples
from tests.train.setting import CONFIGS, make_run, stirred_model

STEPS, IMAGES = 2, 2
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "two_pass, merged": {"schedule": "two_pass", "merged_steps": 2},
    "hybrid": {"schedule": "hybrid", "kept_steps": 1},
    "segments": {"schedule": "segments", "segment_steps": 1},
    "segments, again": {"schedule": "segments", "segment_steps": 1, "kept_steps": 0},
}


def run_of(router: str, stage: str = "posttrain", **rollout: Any) -> RunConfig:
    model = {"depth": 2, "text_width": TEXT_WIDTH, "pooled_width": POOLED_WIDTH}
    if router.startswith("promoe"):
        model |= {"unconditional_expert": False}
    return make_run(
        Path("shards"), Path("runs"), router, stage=stage, model=model, rollout={"num_steps": STEPS} | rollout
    )


def computed(run: RunConfig, size: tuple[int, int] = (8, 8), warm_up: int = 0) -> tuple[int, float]:
    """FLOPs of an optimizer step of two micro-batches, and the rows that experts took.

    warm_up: how often cutoffs of a pool of trajectories are found on these micro-batches before.
    """
    samples = ToySamples(sizes=(size,))
    empty = (torch.zeros(TEXT_LENGTH, TEXT_WIDTH), torch.ones(TEXT_LENGTH, dtype=torch.bool), torch.zeros(POOLED_WIDTH))
    items = tuple(draw_trajectories([samples.batch([i]) for i in range(IMAGES)], empty, run, torch.device("cpu")))
    model = stirred_model(run)
    attach_adapters(model, run.lora)
    freeze(model, run)
    objective = Objective(model, run).train()
    cutoffs = None
    for _ in range(warm_up):
        found = [record.cutoffs for record in objective(StepRequest(items, 1, cutoffs=cutoffs)).records]
        cutoffs = torch.stack([each for each in found if each is not None]).mean(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer = objective(StepRequest(items, 1, with_routing=True, cutoffs=cutoffs))
        answer.loss.backward()
    sums = [record.routing for record in answer.records if record.routing is not None]
    return counter.get_total_flops(), rows_taken(torch.stack(sums).sum(0)) if sums else 0.0


@pytest.mark.parametrize(
    ("router", "schedule"),
    [("diffmoe", schedule) for schedule in SCHEDULES]
    + [(router, schedule) for router in ("tc", "promoe_ec") for schedule in ("checkpoint", "two_pass", "segments")]
    + [("dense", "plain"), ("ec", "hybrid"), ("dsmoe", "checkpoint")],
)
def test_the_count_is_what_runs(router: str, schedule: str) -> None:
    run = run_of(router, **SCHEDULES[schedule])
    flops, rows = computed(run)
    rows /= IMAGES * STEPS
    assert rows == rows_expected(run, 1, 16)
    booked, plan = step_flops(run, 16, TEXT_LENGTH, rows), schedule_of(run)
    assert IMAGES * sum(booked) == flops
    assert (booked.wasted > 0) == (plan.forwards > plan.num_trained or plan.recomputed > 0)


@pytest.mark.parametrize("schedule", ["plain", "checkpoint", "two_pass"])
def test_rows_that_vary_over_a_trajectory_are_counted_by_their_mean(schedule: str) -> None:
    """Which is near what the rule gives; one step takes other rows than another."""
    run = run_of("diffmoe", **SCHEDULES[schedule])
    pooled = run.model_copy(update={"rollout": run.rollout.model_copy(update={"pool": "trajectory"})})
    flops, rows = computed(pooled, warm_up=4)
    assert IMAGES * sum(step_flops(pooled, 16, TEXT_LENGTH, rows / IMAGES / STEPS)) == flops
    assert rows / IMAGES / STEPS == pytest.approx(rows_expected(pooled, 1, 16), rel=0.15)


@pytest.mark.parametrize("schedule", ["checkpoint", "two_pass", "segments"])
def test_saliency_routers_that_the_routing_loss_trains_alone_run_once_more(schedule: str) -> None:
    run = run_of("ec", **SCHEDULES[schedule])
    alone = run.model_copy(update={"loss": run.loss.model_copy(update={"routing_gradient": "saliency_routers"})})
    flops, rows = computed(alone)
    booked = step_flops(alone, 16, TEXT_LENGTH, rows / IMAGES / STEPS)
    assert IMAGES * sum(booked) == flops
    assert booked.router > step_flops(run, 16, TEXT_LENGTH, rows / IMAGES / STEPS).router


@pytest.mark.parametrize("size", [(4, 14), (10, 12)])
@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe", "dsmoe"])
def test_the_count_follows_the_images_of_the_step(router: str, size: tuple[int, int]) -> None:
    run, tokens = run_of(router, schedule="two_pass"), size[0] * size[1] // 4
    flops, rows = computed(run, size)
    assert rows / IMAGES / STEPS == rows_expected(run, 1, tokens)
    assert IMAGES * sum(step_flops(run, tokens, TEXT_LENGTH, rows_expected(run, 1, tokens))) == flops


@pytest.mark.parametrize("schedule", ["plain", "checkpoint", "two_pass", "hybrid", "segments"])
@pytest.mark.parametrize("router", ["ec", "diffmoe"])
def test_pretraining_wastes_only_recomputed_blocks(router: str, schedule: str) -> None:
    run = run_of(router, "pretrain", **SCHEDULES[schedule])
    booked = step_flops(run, 16, TEXT_LENGTH, rows_expected(run, 1, 16))
    assert IMAGES * sum(booked) == computed(run)[0]
    assert (booked.wasted > 0) == (schedule == "checkpoint")


@pytest.mark.parametrize("schedule", ["plain", "checkpoint", "two_pass"])
def test_adapters_are_counted_and_gradients_of_frozen_weights_are_not(schedule: str) -> None:
    pytest.importorskip("peft")
    run = run_of("ec", **SCHEDULES[schedule])
    adapted = run.model_copy(update={"lora": LoraConfig(rank=3)})
    flops, rows = computed(adapted)
    booked = step_flops(adapted, 16, TEXT_LENGTH, rows / IMAGES / STEPS)
    first = 2 * 16 * 24 * (3 * 24 + 3)  # the input of the first block's attn.qkv, and of A there, needs no gradient
    assert IMAGES * (sum(booked) - STEPS * first) == flops
    assert booked.model < 0.8 * step_flops(run, 16, TEXT_LENGTH, rows / IMAGES / STEPS).model


def test_what_is_wasted_is_no_utilisation() -> None:
    booked = {name: step_flops(run_of("diffmoe", **fields), 16, 3, 32.0) for name, fields in SCHEDULES.items()}
    assert len({entry.model for name, entry in booked.items() if "segments" not in name}) == 1
    assert booked["segments"].model == booked["plain"].model / 2
    assert booked["two_pass"].wasted > booked["checkpoint"].wasted > booked["hybrid"].wasted > 0
    assert booked["segments, again"].wasted > booked["two_pass"].wasted  # the step that is not trained has its losses


def test_images_without_class_are_expected_as_often_as_they_are_drawn() -> None:
    run = make_run(Path("shards"), Path("runs"), "promoe_tc", model={"conditioning": "class"})
    run = run.model_copy(update={"model": run.model.model_copy(update={"top_k": 3})})
    assert rows_expected(run, 4, 16) == pytest.approx(run.model.num_moe_layers * 16 * (0.9 * 3 + 0.1))


def test_the_peak_of_a_device_by_its_name() -> None:
    assert _named_peak("NVIDIA H200", "bf16") == 989.5
    assert _named_peak("NVIDIA H200 NVL", "bf16") == 835.5
    assert _named_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.5
    assert _named_peak("NVIDIA H100 PCIe", "bf16") == 756.5
    assert _named_peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert _named_peak("NVIDIA L40S", "bf16") == 362
    assert _named_peak("NVIDIA L4", "bf16") == 121
    assert _named_peak("NVIDIA GeForce RTX 4090", "bf16") is None


def test_a_peak_is_configured_or_unknown() -> None:
    quickstart = str(CONFIGS / "runs" / "quickstart.yaml")
    assert peak_tflops(load_run_config(quickstart), torch.device("cpu")) is None
    assert peak_tflops(load_run_config(quickstart, ["--log.peak_tflops", "0.2"]), torch.device("cpu")) == 0.2
