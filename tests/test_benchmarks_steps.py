"""The benchmarks of sampling, optimizer and checkpoints on toys: outcomes are equal, and every way of doing it runs."""

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint, optimizer, sampling
from benchmarks.harness import Case, Options
from sharpmoe.parallel.ranks.launch import World
from tests.distributed import run_ranks

ON_CPU = {
    name: Options(torch.device("cpu"), dtype, name)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
TOY = sampling.Size(width=32, depth=2, num_heads=2, latent_size=8)
FIELDS: dict[str, object] = {"width": 32, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4}


def run_once(case: Case) -> None:
    """As the harness does before it times a case."""
    if case.check is not None:
        case.check()
    works = (case.ours, case.reference, case.limit)
    assert {work() for work in works if work is not None} <= {1, 2, 4}


def test_sampling() -> None:
    for options in ON_CPU.values():
        model = sampling.class_model("diffmoe", TOY, options)
        case = sampling.saliency_router("router", model, 2, options)
        run_once(case)
        assert 0 < case.facts["flops_added"] < 0.2
        run_once(sampling.joined_branches("branches", model, 2, options))
        run_once(sampling.pool_per_image("images", model, 2, options))
        run_once(sampling.prepared_text("text", sampling.text_model(TOY, options), 2, options))


def engines(world: World) -> None:
    for options in ON_CPU.values():
        run_once(optimizer.optimizer_step("step", FIELDS, world, options))
    with tempfile.TemporaryDirectory() as folder:
        for case in checkpoint.built(Path(folder), ON_CPU["fp32"], FIELDS):
            run_once(case)


@pytest.mark.dist
def test_optimizer_and_checkpoint() -> None:
    run_ranks(engines, 1)
