"""Products of bf16 operands, with the product of CUDA replaced by one of float32 copies: the same sums, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.moe import half_products, router
from sharpmoe.moe.layer import BlockState, MoELayer
from sharpmoe.moe.routing import Routing
from tests.toys import toy_config

Step = tuple[Routing, Tensor, dict[str, Tensor]]


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (half_products, router):
        monkeypatch.setattr(module, "takes_halves", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(half_products, "_product", lambda x, weight: x.float() @ weight.float().t())


def step(config: ModelConfig) -> Step:
    """One call of an MoE layer in bf16 with a backward: its record, the gradient of its input, those of parameters."""
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    layer = layer.bfloat16()
    h, x0_prev = (torch.randn(4, 16, config.width, generator=generator).bfloat16() for _ in range(2))
    y, record = layer(h.requires_grad_(), x0_prev)
    loss = y.float().square().mean() + record.scores.square().mean()
    for part in (record.capacity_logits, record.prediction):
        loss = loss if part is None else loss + part.square().mean()
    loss.backward()
    assert h.grad is not None
    return record, h.grad, {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("family", "gate"), [("diffmoe", "linear"), ("race", "mlp"), ("tc", "prototypes")])
def test_a_layer_routes_and_learns_as_with_float32_copies(
    monkeypatch: pytest.MonkeyPatch, family: str, gate: str
) -> None:
    config = toy_config(family, gate=gate)
    copied, d_copied, gradients = step(config)
    as_on_cuda(monkeypatch)
    halves, d_halves, found = step(config)
    assert torch.equal(halves.routing_map, copied.routing_map)
    torch.testing.assert_close(halves.logits, copied.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_halves, d_copied, rtol=2e-2, atol=2e-3)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():  # bf16 has eight bits: what is rounded once more is off by one part in 128
        assert (found[name] - gradient).float().norm() <= 1e-2 * gradient.float().norm(), name


@pytest.mark.parametrize(("rounds", "bits"), [(False, 0), (True, 8)])
def test_gradients_are_those_of_float32_products(monkeypatch: pytest.MonkeyPatch, rounds: bool, bits: int) -> None:
    as_on_cuda(monkeypatch)
    x, weight = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 5, 16), (8, 16)))
    g = torch.randn(3, 5, 8)
    out = half_products.half_product(x, weight, rounds_gradient=rounds)
    assert torch.equal(out, x.float() @ weight.float().t())
    found = torch.autograd.grad(out, (x, weight), g)
    exact = torch.autograd.grad(x.float() @ weight.float().t(), (x, weight), g)
    for one, other in zip(found, exact, strict=True):
        error = (one - other).float().norm() / other.float().norm()
        assert error == 0 if bits == 0 else error < 2**-7


def test_nothing_changes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
        raise AssertionError("no product of halves on a CPU")

    monkeypatch.setattr(router, "half_product", refuse)
    step(toy_config("diffmoe"))


def test_the_order_of_sums_flips_no_more_choices_than_float32_itself() -> None:
    """Of 8192 tokens of a width of 1024, the best of 16 experts: sums in float32, forward and backward, and exact."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 1024, generator=generator).bfloat16() for n in (8192, 16))
    exact = (x.double() @ weight.double().t()).argmax(-1)
    one_way = (x.float() @ weight.float().t()).argmax(-1)
    other_way = (x.flip(-1).float() @ weight.flip(-1).float().t()).argmax(-1)
    rounded = (x @ weight.t()).argmax(-1)
    assert max(int((way != exact).sum()) for way in (one_way, other_way)) <= 1
    assert int((rounded != exact).sum()) > 20  # a result in bf16 is what flips choices


def test_a_gate_of_time_and_state_takes_halves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = MoELayer(toy_config("ec", gate_input="time_and_state")).bfloat16()
    time, h = torch.randn(2, 24).bfloat16(), torch.randn(2, 16, 24).bfloat16()
    _, copied = layer(h, state=BlockState(time, h))
    as_on_cuda(monkeypatch)
    made = list[torch.dtype]()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        made.append(x.dtype)
        return x.float() @ weight.float().t()

    monkeypatch.setattr(half_products, "_product", product)
    _, halves = layer(h, state=BlockState(time, h))
    assert made == [torch.bfloat16]
    torch.testing.assert_close(halves.logits, copied.logits)
