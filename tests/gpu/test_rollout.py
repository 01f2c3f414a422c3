"""Whole rollouts and sampling on a device: no wait of the host, the CPU's images, memory that does not grow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.models import drawn_model
from benchmarks.rollout import SCHEDULES, TOY, Rollout, Size, make_model, make_rollout
from sharpmoe import sampling
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.model.backbone import Backbone, ClassCondition
from sharpmoe.model.captured import capture_calls
from sharpmoe.train.trajectories import draw_trajectories
from tests.gpu.place import DEVICES, synchronise
from tests.memory import LiveBytes
from tests.moe.test_counters import Waits
from tests.train.setting import ALONE, make_run, plan_for

SAMPLED = {"width": 64, "depth": 2, "num_heads": 2, "latent_size": 16, "num_experts": 4, "num_classes": 5}
IMAGES = 4


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Raise where the host waits for the device, as CUDA or, on the CPU, the operators say."""
    if device == "cpu":
        with Waits() as waits:
            yield
        assert waits.seen == []
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rollout_of(device: str, router: str, schedule: str) -> Rollout:
    size = Size("toy", TOY | {"router": router, "width": 32}, 4)
    model = make_model(size, torch.device(device), torch.bfloat16)
    return make_rollout(model, size, 4).under(**SCHEDULES[schedule] | {"merged_steps": 1})


@pytest.mark.parametrize("schedule", ["plain", "checkpoint", "two_pass", "hybrid_1"])
@pytest.mark.parametrize("router", ["diffmoe", "ec"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_host_never_waits_in_a_rollout(device: str, router: str, schedule: str) -> None:
    """Forward, losses and backward of all steps, where the rule fixes the counts of rows."""
    rollout = rollout_of(device, router, schedule)
    rollout()  # what is made once may wait
    synchronise(device)
    with no_waits(device):
        rollout()
    synchronise(device)
    gradients = [p.grad for p in rollout.objective.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("conditioning", ["text", "class"])
def test_the_host_never_waits_while_it_draws_trajectories(conditioning: str, shards: Path, tmp_path: Path) -> None:
    """Without a device: tests/train/test_trajectories.py."""
    run = make_run(shards, tmp_path, model={"conditioning": conditioning}, rollout={"num_steps": 3, "noise": "markov"})
    data = plan_for(run, ALONE).data
    batch, device = data.train.sources[0].batch([0, 1, 2], [40, 41, 42]), torch.device("cuda")
    draw_trajectories([batch], data.empty_text, run, device)
    synchronise("cuda")
    with no_waits("cuda"):
        (item,) = draw_trajectories([batch], data.empty_text, run, device)
    (expected,) = draw_trajectories([batch], data.empty_text, run, torch.device("cpu"))
    for there, here in zip(tree_leaves(item), tree_leaves(expected), strict=True):
        torch.testing.assert_close(there.cpu(), here)


def test_a_wait_would_be_noticed_on_the_cpu() -> None:
    with pytest.raises(AssertionError), no_waits("cpu"):
        torch.ones(1).item()


@pytest.mark.gpu
def test_a_wait_would_be_noticed_on_cuda() -> None:
    with pytest.raises(RuntimeError, match="synchron"), no_waits("cuda"):
        torch.ones(1, device="cuda").item()


def model_on(device: str, router: str) -> Backbone:
    config = ModelConfig.model_validate(SAMPLED | {"router": router, "conditioning": "class"})
    model = drawn_model(config, torch.device("cpu"), torch.float32).eval()
    return model.to(device)


def sampled(model: Backbone, device: str, steps: int) -> Tensor:
    cond = ClassCondition(torch.arange(IMAGES, device=device))
    request = sampling.Request(cond, sampling.empty_condition(cond, model.config, None), tuple(range(IMAGES)))
    sample = SampleConfig(num_steps=steps, cfg_scale=1.5)
    return sampling.generate(model, model.config, sample, request)


@pytest.mark.parametrize("router", ["diffmoe", "ec", "tc", "race"])
@pytest.mark.parametrize("device", DEVICES)
def test_images_are_those_of_float64_on_the_cpu(device: str, router: str) -> None:
    """In float32. A near-tie that falls the other way changes some tokens of an image, so most pixels are compared."""
    expected = sampled(model_on("cpu", router).double(), "cpu", 8)
    images = sampled(model_on(device, router), device, 8)
    assert images.device.type == device
    assert not images.requires_grad
    far = (images.cpu().double() - expected.double()).abs() / expected.double().abs().max()
    assert float((far > 1e-3).double().mean()) < 0.05
    assert far.mean() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("router", "dtype"), [("ec", torch.float32), ("ec", torch.bfloat16), ("tc", torch.bfloat16)])
def test_cuda_graphs_draw_the_images_of_calls(router: str, dtype: torch.dtype) -> None:
    """Without a device: tests/model/test_captured.py."""
    plain, model = model_on("cuda", router).to(dtype), model_on("cuda", router).to(dtype)
    capture_calls(model)
    for steps in (2, 8):  # records, and draws with what it recorded
        torch.testing.assert_close(sampled(model, "cuda", steps), sampled(plain, "cuda", steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ["diffmoe", "tc"])
@pytest.mark.parametrize("device", DEVICES)
def test_memory_does_not_grow_with_the_steps(device: str, router: str) -> None:
    model = model_on(device, router)
    sampled(model, device, 2)
    few, many = (peak_bytes(device, lambda steps=steps: sampled(model, device, steps)) for steps in (5, 50))
    assert 0 < many <= 1.02 * few


def peak_bytes(device: str, work: Callable[[], object]) -> int:
    """The most that tensors made by `work` hold at one time."""
    if device == "cpu":
        with LiveBytes() as live:
            work()
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
