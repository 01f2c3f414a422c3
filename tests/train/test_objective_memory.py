"""What a schedule keeps, counted: bytes that autograd saves, and all bytes that are alive."""

import pytest
import torch

from benchmarks.memory import SavedBytes
from sharpmoe.config import LossConfig, ModelConfig, RolloutConfig, RunConfig
from sharpmoe.flow import descending_times
from sharpmoe.model.backbone import TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective, StepRequest
from tests.memory import LiveBytes

BATCH = 4


def a_run(steps: int, router: str = "diffmoe", **fields: object) -> RunConfig:
    model = ModelConfig(
        width=24, depth=4, num_heads=2, latent_size=16, router=router, num_experts=4, text_width=6, pooled_width=4
    )
    rollout = RolloutConfig(num_steps=steps, **fields)
    return RunConfig(model=model, rollout=rollout, loss=LossConfig(routing_weight=0.5))


def an_item(steps: int) -> TrajectoryBatch:
    g = torch.Generator().manual_seed(3)
    x0, x1 = torch.randn(2, BATCH, 4, 16, 16, generator=g)
    times = descending_times(torch.rand(steps - 1, BATCH, generator=g), 0.999)
    condition = TextCondition(torch.randn(BATCH, 5, 6), torch.ones(BATCH, 5, dtype=torch.bool), torch.randn(BATCH, 4))
    return TrajectoryBatch(x0, x1, times, condition, torch.rand(BATCH, 64, generator=g))


def saved(run: RunConfig, micro_batches: int = 1) -> int:
    """Most bytes that graphs held at one time."""
    objective = Objective(build_model(run.model), run).train()
    items = tuple(an_item(run.rollout.num_steps) for _ in range(micro_batches))
    with SavedBytes([*objective.parameters(), *objective.buffers()]).watch() as count:
        objective(StepRequest(items)).loss.backward()
    assert count.now == 0
    return count.peak


def alive(run: RunConfig) -> int:
    """Most bytes of tensors that were alive at one time, gradients included."""
    objective, item = Objective(build_model(run.model), run).train(), an_item(run.rollout.num_steps)
    with LiveBytes() as count:
        objective(StepRequest((item,))).loss.backward()
    return count.peak


@pytest.mark.parametrize("router", ["tc", "diffmoe"])
def test_two_pass_saves_what_one_plain_step_saves(router: str) -> None:
    one = saved(a_run(1, router))
    counts = [saved(a_run(steps, router, schedule="two_pass")) for steps in (2, 5, 10)]
    assert counts[0] == counts[1] == counts[2] <= 1.05 * one
    assert saved(a_run(10, router, schedule="two_pass"), micro_batches=2) == counts[0]
    assert saved(a_run(10, router, schedule="segments", segment_steps=5, kept_steps=0)) == counts[0]


def test_graphs_kept() -> None:
    one = saved(a_run(1))
    for kept in (1, 3):
        assert saved(a_run(6, schedule="hybrid", kept_steps=kept)) == pytest.approx(kept * one, rel=0.02)
    assert saved(a_run(6)) == pytest.approx(6 * one, rel=0.02)
    assert saved(a_run(6, schedule="two_pass", merged_steps=2)) == pytest.approx(2 * one, rel=0.02)


@pytest.mark.slow
def test_memory_of_two_pass_hardly_grows_with_the_steps() -> None:
    few, many = (alive(a_run(steps, schedule="two_pass")) for steps in (2, 12))
    x0_prev, maps, figures = BATCH * 4 * 16 * 16 * 4, 2 * BATCH * 64 * 4, 256
    assert many - few <= 10 * (x0_prev + maps + figures)  # what a second pass is given of ten more steps
    sums = 4 * sum(p.numel() for p in build_model(a_run(1).model).parameters())
    assert few <= 1.05 * (alive(a_run(1)) + sums)
    assert alive(a_run(6, schedule="checkpoint")) < 0.25 * alive(a_run(6))
