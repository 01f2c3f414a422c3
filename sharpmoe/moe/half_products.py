"""Products of bf16 operands with a float32 result, on CUDA: what routers compute in float32 without float32 copies.

A product of two bf16 numbers is exact in float32, so the result differs from that of float32 copies only in the order
of its sums, while tensor cores make it many times as fast. The CPU has no such product and none is needed there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def takes_halves(x: Tensor) -> bool:
    """Whether x, of any shape, and weights of its dtype are multiplied here: bf16 on CUDA."""
    return x.is_cuda and x.dtype == torch.bfloat16


def half_product(x: Tensor, weight: Tensor, *, rounds_gradient: bool) -> Tensor:
    """Multiply x (..., in) by weight (out, in) transposed, both bf16: (..., out) float32. Differentiable once.

    rounds_gradient: the gradient of the result is rounded to bf16, as elsewhere in the network, and its products are of
    bf16 operands too; else they are float32 products of copies.
    """
    out: Tensor = _HalfProduct.apply(x.flatten(0, -2), weight, rounds_gradient)
    return out.unflatten(0, x.shape[:-1])


class _HalfProduct(torch.autograd.Function):
    """Saves the parameter itself, which ZeRO-3 may partition and gather again before backward (see `products`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounds_gradient: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounds_gradient = rounds_gradient
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dtype = x.dtype if ctx.rounds_gradient else gradient.dtype
        gradient = gradient.to(dtype)
        d_x = (gradient @ weight.to(dtype)).to(x.dtype) if needs_x else None
        d_weight = (gradient.t() @ x.to(dtype)).to(weight.dtype) if needs_weight else None
        return d_x, d_weight, None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (R, in) by weight (out, in) transposed, summed in float32: (R, out) float32."""
    return torch.mm(x, weight.t(), out_dtype=torch.float32)
