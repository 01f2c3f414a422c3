"""Modulation and gate as CUDA computes them, run on the CPU: values and gradients of the plain operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharpmoe.model import adaln


def inputs(dtype: torch.dtype, small: int) -> tuple[list[Tensor], Tensor]:
    """Three inputs, (B, N, D) but for the given places (B, D), and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 24) if small >> place & 1 else (3, 16, 24) for place in range(3)]
    given = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return given, torch.randn(3, 16, 24, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("function", "small"), [(adaln.modulate, 0b110), (adaln.add_gated, 0b010)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_fused_is_plain(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], small: int, dtype: torch.dtype, error: float
) -> None:
    given, gradient = inputs(dtype, small)
    plain = function(*given)
    expected = (plain, *torch.autograd.grad(plain, given, gradient))
    monkeypatch.setattr(adaln, "_fuses", lambda x: True)
    fused = function(*given)
    assert fused.grad_fn is not None
    assert "Backward" in type(fused.grad_fn).__name__
    assert type(fused.grad_fn) is not type(plain.grad_fn)
    for found, wanted in zip((fused, *torch.autograd.grad(fused, given, gradient)), expected, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() <= error * wanted.norm()


def test_only_what_needs_a_gradient_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaln, "_fuses", lambda x: True)
    (x, shift, scale), gradient = inputs(torch.float64, 0b110)
    adaln.modulate(x.detach(), shift, scale.detach()).backward(gradient)
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, gradient.sum(1))
    (x, gate, y), gradient = inputs(torch.float64, 0b010)
    adaln.add_gated(x, gate.detach(), y.detach()).backward(gradient)
    torch.testing.assert_close(x.grad, gradient)
