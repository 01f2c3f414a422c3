"""Move tokens to the experts that took them, and their outputs back: two calls around the experts.

Rows lie sorted by expert, then by token. Sums over a token's rows read them in a fixed order and add nothing
atomically, forward and backward, so that a layer gives the same bits every time, on CUDA too; and no buffer of experts
times tokens is made.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RowCounts(NamedTuple):
    """What a selection rule fixes about the rows that experts take, so that it need not be read from the device.

    Neither field: the counts vary and only the device knows them.
    """

    per_expert: int | None = None  # every expert takes so many rows
    total: int | None = None  # all experts together take so many rows
    by_construction: bool = False  # the rule made the map just now, from which the counts follow


class Assignment(NamedTuple):
    """Which of E experts take which of R tokens, and with what weight."""

    routing_map: Tensor  # (R, E) bool
    gates: Tensor  # (R, E) weight of each expert's output
    counts: RowCounts = RowCounts()


class Dispatched(NamedTuple):
    """Tokens at their experts, ready for `Experts`."""

    rows: Tensor  # (P, D) sorted by expert: those of the experts that this rank holds
    counts: Tensor | int  # rows of each of these experts: (E_local,) int64, or an int where all have the same
    ticket: Any  # what `combine` of the same dispatcher needs; belongs to this call alone


class Dispatcher(Protocol):
    """Sends each token to the experts that took it, and sums the gated outputs. Keeps nothing between calls."""

    def dispatch(self, x: Tensor, assignment: Assignment) -> Dispatched:
        """Send tokens x (R, D) to their experts."""
        ...

    def combine(self, out: Tensor, ticket: Any) -> Tensor:
        """Return y (R, D): per token the sum over its experts of gate * output; zeros where no expert took it.

        out (P, D): the outputs for the dispatched rows, in their order.
        """
        ...


class LocalDispatcher:
    """All experts are on this rank: reorder rows by expert, and back. No communication."""

    def dispatch(self, x: Tensor, assignment: Assignment) -> Dispatched:
        counts, total = _count_rows(assignment)
        pairs = Pairs.find(assignment.routing_map, total)
        return Dispatched(pairs.take(x), counts, (pairs, assignment.gates))

    def combine(self, out: Tensor, ticket: tuple["Pairs", Tensor]) -> Tensor:
        pairs, gates = ticket
        return pairs.combine(out, gates)


class Pairs(NamedTuple):
    """The P pairs (token, expert) of a routing map (R, E), each of them a row. All int64."""

    expert: Tensor  # (P,) of each row; rows are sorted by expert, then token
    token: Tensor  # (P,) of each row
    rows: Tensor  # (P,) the rows of the first token, then those of the second, ...; a token's in the order of experts
    starts: Tensor  # (R,) where each token's begin in `rows`

    @classmethod
    def find(cls, routing_map: Tensor, total: int) -> "Pairs":
        """Find the pairs of a routing map (R, E) with `total` of them, without reading their number from the device."""
        by_expert = routing_map.t().contiguous()
        expert, token = torch.nonzero_static(by_expert, size=total).unbind(1)
        token_again, expert_again = torch.nonzero_static(routing_map, size=total).unbind(1)  # sorted by token
        row = by_expert.flatten().cumsum(0).view_as(by_expert) - 1  # of each pair
        per_token = routing_map.sum(1)
        return cls(expert, token, row[expert_again, token_again], per_token.cumsum(0) - per_token)

    def take(self, x: Tensor) -> Tensor:
        """Copy tokens (R, D) to rows (P, D)."""
        rows: Tensor = _Take.apply(x, self)
        return rows

    def combine(self, out: Tensor, gates: Tensor) -> Tensor:
        """Multiply outputs (P, D) by their gates and sum them per token: (R, D). A token that nobody took gets zeros.

        gates (R, E); they are rounded to the dtype of the outputs, their gradient is summed in their own.
        """
        y: Tensor = _Combine.apply(out, gates, self)
        return y


def check_equal_counts(assignment: Assignment) -> None:
    """Stop where a map (R, E) does not give every expert the rows that it promises: the output would be silently wrong.

    On CPU a RuntimeError; on CUDA, without waiting for the device, an assertion there, which ends the process.
    """
    routing_map, per_expert = assignment.routing_map, assignment.counts.per_expert
    if per_expert is None or not _is_compared(assignment):
        return
    fits = (routing_map.sum(0) == per_expert).all()
    torch._assert_async(
        fits, f"routing map: not every expert took {per_expert} rows; where counts vary, pass RowCounts() instead"
    )


def _is_compared(assignment: Assignment) -> bool:
    """Whether a map is compared with the counts that it promises.

    On CUDA, where that is four kernels, one that a rule has just made is not: a wrong rule is found on the CPU.
    """
    return not (assignment.counts.by_construction and assignment.routing_map.is_cuda)


def _count_rows(assignment: Assignment) -> tuple[Tensor | int, int]:
    """Count the rows of each expert, and of all. Reads the device only where the counts vary."""
    routing_map, (per_expert, total, _) = assignment.routing_map, assignment.counts
    if per_expert is not None:
        check_equal_counts(assignment)
        return per_expert, per_expert * routing_map.shape[1]
    counts = routing_map.sum(0)
    if total is None:
        return counts, int(counts.sum())
    if _is_compared(assignment):
        torch._assert_async(counts.sum() == total, f"routing map: experts did not take {total} rows together")
    return counts, total


def _sum_rows(rows: Tensor, order: Tensor, starts: Tensor, gates: Tensor | None) -> Tensor:
    """Sum rows (P, D), each times its gate (P,), per token: (R, D). `order`, `starts`: rows and starts of `Pairs`."""
    if not len(rows):
        return rows.new_zeros(len(starts), rows.shape[1])
    weights = None if gates is None else gates.index_select(0, order)
    # A bag of an embedding is this sum: no atomics, accumulated in float32 or better.
    return functional.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=weights)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(pairs.rows, pairs.starts)
        return x.index_select(0, pairs.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        order, starts = ctx.saved_tensors
        return _sum_rows(gradient.contiguous(), order, starts, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gates: Tensor, pairs: Pairs) -> Tensor:
        gate = gates[pairs.token, pairs.expert].to(out.dtype)
        ctx.save_for_backward(out, gate, pairs.token, pairs.expert)
        ctx.gates_shape, ctx.gates_dtype = gates.shape, gates.dtype
        return _sum_rows(out, pairs.rows, pairs.starts, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        out, gate, token, expert = ctx.saved_tensors
        rows, d_gates = gradient.index_select(0, token), None
        if ctx.needs_input_grad[1]:
            dots = (rows * out).sum(-1, dtype=ctx.gates_dtype)
            d_gates = dots.new_zeros(ctx.gates_shape).index_put_((token, expert), dots)  # no pair comes twice
        return rows.mul_(gate.unsqueeze(-1)) if ctx.needs_input_grad[0] else None, d_gates, None
