"""The reference for stacked experts: every expert on every token, weighted. Float64, no permutation."""

import torch
from torch import Tensor
from torch.nn import functional

from sharpmoe.moe.dispatch import Assignment, Dispatcher
from sharpmoe.moe.experts import Experts


def stacked_weights(num_experts: int, width: int, hidden: int, kind: str = "gelu", seed: int = 0) -> list[Tensor]:
    """w1, w2, w3 of `Experts`, drawn with a scale at which each matters."""
    g = torch.Generator().manual_seed(seed)
    third = (hidden, width) if kind == "swiglu" else (1, hidden + width)
    shapes = ((hidden, width), (width, hidden), third)
    return [torch.randn(num_experts, *s, generator=g, dtype=torch.float64) * width**-0.5 for s in shapes]


def dense_experts(x: Tensor, gates: Tensor, weights: list[Tensor], kind: str = "gelu") -> Tensor:
    """Sum over experts of gate * expert(x): x (R, D), gates (R, E), zero where nothing is chosen."""
    w1, w2, w3 = weights
    inner = torch.einsum("rd,efd->erf", x, w1)
    if kind == "swiglu":
        out = torch.einsum("erf,edf->erd", functional.silu(inner) * torch.einsum("rd,efd->erf", x, w3), w2)
    else:
        b1, b2 = w3.split([w1.shape[1], w1.shape[2]], dim=-1)
        out = torch.einsum("erf,edf->erd", functional.gelu(inner + b1, approximate="tanh"), w2) + b2
    return torch.einsum("erd,re->rd", out, gates)


def apply_experts(dispatcher: Dispatcher, experts: Experts, x: Tensor, assignment: Assignment) -> Tensor:
    """Dispatch tokens x (R, D), apply the experts, combine: as an MoE layer does."""
    rows, counts, ticket = dispatcher.dispatch(x, assignment)
    return dispatcher.combine(experts(rows, counts), ticket)
