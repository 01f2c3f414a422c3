"""Moving tokens to experts and back. A dispatcher is a plain object; with one rank it does not communicate."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sharpmoe.moe.experts import Experts


class Dispatcher(Protocol):
    """Sends each token to the experts that took it and sums their gated answers. Keeps nothing between calls."""

    def __call__(
        self, x: Tensor, routing_map: Tensor, gates: Tensor, experts: Experts, rows_per_expert: int | None
    ) -> Tensor:
        """Return y (R, D): sum over the chosen experts of gate * expert(x).

        x (R, D) tokens, routing_map (R, E) bool, gates (R, E). `rows_per_expert` is given where the selection rule
        fixes every expert's count, so that the count need not be read back from the device.
        """
        ...


class Choices(NamedTuple):
    """The pairs of a routing map, sorted by expert, then token: both (P,) int64."""

    expert: Tensor
    token: Tensor


class LocalDispatcher:
    """All experts live here: permute rows by expert, compute, unpermute. No communication."""

    def __call__(
        self, x: Tensor, routing_map: Tensor, gates: Tensor, experts: Experts, rows_per_expert: int | None
    ) -> Tensor:
        """See `Dispatcher`."""
        if rows_per_expert is None:
            counts: Tensor | int = routing_map.sum(0)
            choices = Choices(*routing_map.t().nonzero(as_tuple=True))
        else:
            check_equal_counts(routing_map, rows_per_expert)
            counts = rows_per_expert
            choices = find_choices(routing_map, rows_per_expert * routing_map.shape[1])
        return combine(experts(x.index_select(0, choices.token), counts), choices, x, gates)


def find_choices(routing_map: Tensor, total: int) -> Choices:
    """The pairs of a routing map (R, E) with `total` of them, without reading their number back from the device."""
    pairs = torch.nonzero_static(routing_map.t(), size=total)
    return Choices(pairs[:, 0], pairs[:, 1])


def combine(out: Tensor, choices: Choices, x: Tensor, gates: Tensor) -> Tensor:
    """Gate the experts' answers (P, D) and sum them per token: (R, D). A token that nobody took gets zeros."""
    gated = out * gates[choices.token, choices.expert].to(out.dtype).unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, choices.token, gated)


def check_equal_counts(routing_map: Tensor, rows_per_expert: int) -> None:
    """Stop where a map (R, E) does not give every expert `rows_per_expert` rows: the answer would be silently wrong.

    On CPU a RuntimeError; on CUDA, without waiting for the device, an assertion there, which ends the process.
    """
    fits = (routing_map.sum(0) == rows_per_expert).all()
    torch._assert_async(
        fits, f"routing map: not every expert took {rows_per_expert} rows; pass rows_per_expert=None for varying counts"
    )
