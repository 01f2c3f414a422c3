"""What the tests of dispatchers share: tokens by rank, maps of every kind, and the outcome of one process."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.moe.dispatch import Dispatcher
from sharpmoe.moe.experts import Experts
from sharpmoe.parallel.experts.dispatch import _NativeDispatcher
from sharpmoe.parallel.experts.groups import ExpertGroups
from sharpmoe.parallel.experts.megatron import MegatronDispatcher
from tests.moe.dense import dense_experts, stacked_weights

E, D, F = 8, 64, 32
DISPATCHERS: dict[str, Callable[[ExpertGroups], Dispatcher]] = {
    "native": lambda groups: _NativeDispatcher(groups.ep_group, E),
    "megatron": lambda groups: MegatronDispatcher(groups, E, D),
}


class Case(NamedTuple):
    """One comparison."""

    map: str
    dtype: torch.dtype = torch.float64
    calls: int = 1  # of the same dispatcher in one graph, each on the outcome of the one before
    recompute: bool = False
    kind: str = "gelu"
    each: int | None = None  # RowCounts.per_expert


CASES = {
    "equal counts": Case("equal", each=3),
    "varying": Case("varying"),
    "varying float32": Case("varying", torch.float32),
    "varying bf16": Case("varying", torch.bfloat16),
    "swiglu": Case("varying", kind="swiglu"),
    "two experts per token": Case("two"),
    "all to one expert": Case("one"),
    "no token was taken": Case("none"),
    "a rank without tokens": Case("no tokens on rank 1"),
    "a rank whose tokens nobody took": Case("nothing taken on rank 1"),
    "several calls": Case("varying", calls=3),
    "several calls recomputed": Case("varying", calls=3, recompute=True),
    "a rank without tokens, recomputed": Case("no tokens on rank 1", calls=2, recompute=True),
    "equal counts float32": Case("equal", torch.float32, each=3),
    "equal counts bf16": Case("equal", torch.bfloat16, each=3),
    "equal counts swiglu": Case("equal", kind="swiglu", each=3),
    "equal counts, not told": Case("equal"),
    "equal counts recomputed": Case("equal", calls=3, recompute=True, each=3),
}


class Tokens(NamedTuple):
    """What one rank holds: its tokens, what it chose, and the weights of the loss."""

    x: Tensor
    chosen: Tensor
    gates: Tensor
    weight: Tensor


def tokens_of(rank: int, kind: str, call: int = 0) -> Tokens:
    """Drawn from the rank's own seed, so that one process can draw all ranks' tokens."""
    g = torch.Generator().manual_seed(10 + rank)
    count = 12 if kind == "equal" else 13 + 5 * rank
    if kind == "no tokens on rank 1" and rank == 1:
        count = 0
    x, weight = (torch.randn(count, D, generator=g, dtype=torch.float64) for _ in range(2))
    g.manual_seed(100 * call + rank)
    gates = torch.rand(count, E, generator=g, dtype=torch.float64)  # also where nothing is chosen: it must not matter
    return Tokens(x, chosen_by(kind, rank, torch.rand(count, E, generator=g)), gates, weight)


def chosen_by(kind: str, rank: int, draw: Tensor) -> Tensor:
    if kind == "two":
        return torch.zeros_like(draw).scatter_(1, draw.topk(2, 1).indices, 1).bool()
    if kind == "equal":
        return torch.zeros_like(draw).scatter_(0, draw.topk(3, 0).indices, 1).bool()
    if kind == "none" or (kind == "nothing taken on rank 1" and rank == 1):
        return torch.zeros_like(draw).bool()
    if kind == "one":
        return torch.arange(E).expand(len(draw), E) == E - 2
    # expert 0 takes nothing, expert 7 everything; every third token only what expert 7 takes
    varying = draw < torch.tensor([0.0, 0.1, 0.9, 0.3, 0.3, 0.5, 0.05, 1.0])
    varying[::3, :7] = False
    varying[1::5] = False
    return varying


def chain(x: Tensor, gates: list[Tensor], layer: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Calls on top of each other, as a rollout makes them."""
    h = x
    for call, gate in enumerate(gates):
        h = x + layer(call, h, gate)
    return h


class Outcome(NamedTuple):
    """Value and gradients."""

    y: Tensor
    dx: Tensor
    dgates: Tensor
    dweights: list[Tensor]


def reference(case: Case, world: int) -> list[Outcome]:
    """By rank: value and gradients of its own tokens, and the gradients of all experts from its tokens alone."""
    outcomes = []
    for rank in range(world):
        drawn = [tokens_of(rank, case.map, call) for call in range(case.calls)]
        weights = [w.requires_grad_() for w in stacked_weights(E, D, F, case.kind)]
        x, gates = drawn[0].x.requires_grad_(), [d.gates.requires_grad_() for d in drawn]
        y = chain(x, gates, lambda call, h, gate: dense_experts(h, drawn[call].chosen * gate, weights, case.kind))  # noqa: B023
        (y * drawn[0].weight).sum().backward()
        outcomes.append(Outcome(y.detach(), x.grad, torch.stack([g.grad for g in gates]), [w.grad for w in weights]))
    return outcomes


def local_part(groups: ExpertGroups, case: Case) -> Experts:
    each = E // groups.ep_size
    experts = Experts(each, D, F, case.kind).to(case.dtype)
    first = groups.ep_rank * each
    with torch.no_grad():
        for parameter, whole in zip(experts.parameters(), stacked_weights(E, D, F, case.kind), strict=True):
            parameter.copy_(whole[first : first + each])
    return experts
