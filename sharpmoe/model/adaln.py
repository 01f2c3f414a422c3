"""Adaptive layer norm's modulation and gate (DiT, arXiv 2212.09748, adaLN-Zero): one kernel fewer each on CUDA.

There a multiplication and an addition are one kernel, which rounds once. torch's own derivative of that kernel would
multiply full-size tensors by one, hence the two functions here. The CPU keeps the two operators and their bits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, N, D) * (1 + scale) + shift, with shift and scale (B, D)."""
    shift, factor = shift.unsqueeze(1), 1 + scale.unsqueeze(1)
    if not _fuses(x):
        return x * factor + shift
    out: Tensor = _Modulate.apply(x, shift, factor)
    return out


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return x + gate * y of x and y (B, N, D) and a gate (B, D)."""
    gate = gate.unsqueeze(1)
    if not _fuses(x):
        return x + gate * y
    out: Tensor = _AddGated.apply(x, gate, y)
    return out


def _fuses(x: Tensor) -> bool:
    return x.is_cuda


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return torch.addcmul(shift, x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, factor = ctx.saved_tensors
        needs_x, needs_shift, needs_factor = ctx.needs_input_grad
        return (
            gradient * factor if needs_x else None,
            gradient.sum(1, keepdim=True) if needs_shift else None,
            (gradient * x).sum(1, keepdim=True) if needs_factor else None,
        )


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate, y = ctx.saved_tensors
        _, needs_gate, needs_y = ctx.needs_input_grad
        d_gate = (gradient * y).sum(1, keepdim=True) if needs_gate else None
        return gradient, d_gate, gradient * gate if needs_y else None
