"""Benchmarks of layer, block and step at toy size: outcomes agree, every way runs, and a difference is noticed."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import block, ceilings, moe_layer, train_step
from benchmarks.harness import Case, Options, measure
from benchmarks.models import drawn_model
from benchmarks.moe_layer import Size
from benchmarks.published import assert_close, stacked
from sharpmoe.config import ModelConfig
from sharpmoe.model.build import build_model
from sharpmoe.moe import products

OPTIONS = [Options(torch.device("cpu"), torch.float32, "fp32"), Options(torch.device("cpu"), torch.bfloat16, "bf16")]
TOY = Size("tiny", 4, 1)


def toy_step(options: Options, build: Callable[..., Case]) -> Case:
    fields = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "latent_size": 8, "saliency_router": False}
    config = ModelConfig.model_validate(fields | {"conditioning": "class", "num_classes": 3})
    return build(config, 2, "toy", options)


CASES = {
    "diffmoe": lambda options: moe_layer.diffmoe(TOY, options),
    "bound": lambda options: moe_layer.bound(TOY, options),
    "ec": lambda options: moe_layer.expert_choice_layer(TOY, options),
    "dispatch": lambda options: moe_layer.dispatch(TOY, options),
    "block": lambda options: block.block(TOY, options),
    "step": lambda options: toy_step(options, train_step.published_step),
    "layers of a step": lambda options: toy_step(options, train_step.layers),
    "engine's step": lambda options: toy_step(options, train_step.engine_step),
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.precision)
@pytest.mark.parametrize("name", CASES)
def test_every_way_runs_and_agrees(name: str, options: Options) -> None:
    result = measure(CASES[name](options), 2)
    assert result.ratio is not None
    assert "nan" not in str(result)


def test_a_dense_layer_of_equal_flops_has_them() -> None:
    case = moe_layer.diffmoe(TOY, OPTIONS[0])
    assert moe_layer.flops(case.limit) == pytest.approx(1e9 * case.facts["gflop"], rel=2e-3)
    blocks = block.block(TOY, OPTIONS[0])
    assert moe_layer.flops(blocks.limit) == pytest.approx(1e9 * blocks.facts["gflop"], rel=2e-3)


def test_ceilings_tell_rates() -> None:
    products = [planned.build() for planned in ceilings.products("tiny", 4, 256, OPTIONS[0])]
    results = [measure(case, 2) for case in [*products, ceilings.copying(2**20, OPTIONS[0])]]
    assert [list(result.facts) for result in results] == [["tflop/s"], ["tflop/s"], ["gb/s"]]
    assert results[0].facts["tflop/s"] * results[0].ours == pytest.approx(1e3 * 2 * 256 * 128 * 512 / 1e12)


def test_a_difference_is_noticed() -> None:
    case = moe_layer.diffmoe(TOY, OPTIONS[0])
    with torch.no_grad():
        case.ours.layer.experts.w2[1] *= 1.01
    with pytest.raises(AssertionError):
        case.check()
    with pytest.raises(AssertionError):
        assert_close({"a": torch.ones(2)}, {"b": torch.ones(2)}, 1.0)


def test_both_updates_do_the_same() -> None:
    case = toy_step(OPTIONS[0], train_step.published_step)
    for _ in range(3):
        case.ours(), case.reference()
    for name in ("masters", "average"):
        pairs = [dict(zip(names_of(step), getattr(step, name), strict=True)) for step in (case.ours, case.reference)]
        assert_close(*map(stacked, pairs), 1e-3)
    assert all(map(torch.equal, case.ours.masters, case.ours.parameters))


def names_of(step: train_step.Step) -> list[str]:
    return [name for name, _ in step.model.named_parameters()]


def test_grouped_products_are_counted() -> None:
    """As CUDA runs them in bf16: forward, gradient of the rows and gradient of the weights."""
    counts = torch.tensor([3, 0, 8, 5])
    rows = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 24, 32, dtype=torch.bfloat16, requires_grad=True)

    def work() -> None:
        y = products.product(rows, weight, None, products._grouped(counts, rows))
        y.backward(torch.ones_like(y))

    assert moe_layer.flops(work) == 3 * 2 * 16 * 32 * 24


def test_models_are_drawn_where_they_compute() -> None:
    config = ModelConfig.model_validate({"preset": "tiny", "latent_size": 8, "conditioning": "class"})
    one, same, other = (drawn_model(config, torch.device("cpu"), torch.bfloat16, seed) for seed in (0, 0, 1))
    assert one.training
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.bfloat16, name
        assert a.count_nonzero() > 0.9 * a.numel(), name
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
    built = dict(build_model(config).named_buffers())
    assert {name: torch.equal(buffer, built[name]) for name, buffer in one.named_buffers()} == dict.fromkeys(
        built, True
    )
