"""Moving tokens to experts and back. A dispatcher is a plain object; with one rank it does not communicate."""

from typing import Protocol

import torch
from torch import Tensor

from sharpmoe.moe.experts import Experts


class Dispatcher(Protocol):
    """Sends each token to the experts that took it and sums their gated answers."""

    def __call__(
        self, x: Tensor, routing_map: Tensor, gates: Tensor, experts: Experts, rows_per_expert: int | None
    ) -> Tensor:
        """Return y (R, D): sum over the chosen experts of gate * expert(x).

        x (R, D) tokens, routing_map (R, E) bool, gates (R, E). `rows_per_expert` is given where the selection rule
        fixes every expert's count, so that the count need not be read back from the device.
        """
        ...


class LocalDispatcher:
    """All experts live here: permute rows by expert, compute, unpermute. No communication."""

    def __call__(
        self, x: Tensor, routing_map: Tensor, gates: Tensor, experts: Experts, rows_per_expert: int | None
    ) -> Tensor:
        """See `Dispatcher`."""
        expert_index, token_index = routing_map.t().nonzero(as_tuple=True)  # sorted by expert, then token
        if rows_per_expert is None:
            counts = torch.bincount(expert_index, minlength=experts.num_experts).tolist()
        else:
            counts = [rows_per_expert] * experts.num_experts
        out = experts(x.index_select(0, token_index), counts)
        out = out * gates[token_index, expert_index].to(out.dtype).unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token_index, out)
