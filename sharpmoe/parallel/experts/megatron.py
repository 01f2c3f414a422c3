"""Megatron-core's dispatcher on our groups. parallel_state is never initialised: the groups come as a collection.

Megatron-core 0.16.1 keeps what it computes for a call (splits, permutations, shapes) on the dispatcher between its six
stages. A layer runs many times in one graph here and again under recomputation, so each call works on its own shallow
copy of one template: calls share the configuration and nothing else.
"""

import copy
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sharpmoe.devices import default_device
from sharpmoe.moe.dispatch import Assignment, Dispatched, check_equal_counts
from sharpmoe.parallel.experts.exchange import SplitSizes, exchange
from sharpmoe.parallel.experts.groups import ExpertGroups


class MegatronDispatcher:
    """Megatron-core's MoEAlltoAllTokenDispatcher: the stock class on CUDA, a portable subclass elsewhere.

    Every rank of the group makes the same calls, each on its own tokens. Gates travel beside the rows and are applied
    where the experts are, so a forward takes one collective more than the native dispatcher: counts (gathered), rows,
    gates, outputs; three where the counts per expert are fixed (the same on all ranks of the group), and then nothing
    is read back from the device. A fixed total does not help, for what comes from other ranks varies. Backward takes
    three.
    """

    def __init__(self, groups: ExpertGroups, num_experts: int, width: int) -> None:
        self._template = _make_template(groups, num_experts, width)

    def dispatch(self, x: Tensor, assignment: Assignment) -> Dispatched:
        """Send tokens x (R, D) and gates to the ranks of their experts. Communicates on the group, in backward too."""
        call, per_expert = copy.copy(self._template), assignment.counts.per_expert
        if per_expert is not None:
            check_equal_counts(assignment)
            _fix_counts(call, len(x), per_expert)
        rows, gates = call.dispatch_preprocess(x, assignment.routing_map, assignment.gates)
        rows, gates = call.token_dispatch(rows, gates)
        rows, counts, gates = call.dispatch_postprocess(rows, gates)
        ticket = _Ticket(call, gates)
        return Dispatched(rows, counts.to(rows.device) if per_expert is None else per_expert * call.ep_size, ticket)

    def combine(self, out: Tensor, ticket: "_Ticket") -> Tensor:
        """Gate outputs (P, D) and send them back to their tokens' rank. Communicates on the group, in backward too.

        The gates are rounded to the dtype of the outputs.
        """
        call = ticket.call
        out = out * ticket.gates.to(out.dtype).unsqueeze(-1)
        y: Tensor = call.combine_postprocess(call.token_combine(call.combine_preprocess(out)))
        return y


class _Ticket(NamedTuple):
    """What `MegatronDispatcher.combine` needs of its `dispatch`."""

    call: MoEAlltoAllTokenDispatcher  # holds the splits and permutations of this call
    gates: Tensor  # (P,) of the rows that are here


def _fix_counts(call: MoEAlltoAllTokenDispatcher, tokens: int, per_expert: int) -> None:
    """Set one call to Megatron's mode of fixed shapes: each rank sends `per_expert` rows to each expert.

    That mode accepts any map and is right for equal counts only. It computes the count as ceil(tokens * top_k /
    experts * factor), so the factor aims half a row lower, clear of rounding.
    """
    call.drop_and_pad = True
    even = tokens * call.config.moe_router_topk / call.num_experts
    call.moe_expert_capacity_factor = (per_expert - 0.5) / even if per_expert else 0.0


def _make_template(groups: ExpertGroups, num_experts: int, width: int) -> MoEAlltoAllTokenDispatcher:
    """Build the dispatcher that calls are copied from. No communication."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        expert_model_parallel_size=groups.ep_size,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_router_topk=1,
        moe_router_pre_softmax=True,
        add_bias_linear=False,
        # Routing is done already and nothing is dropped. This only makes Megatron count the rows of the map instead
        # of assuming tokens * top_k.
        moe_expert_capacity_factor=1.0,
    )
    each = num_experts // groups.ep_size
    first = groups.ep_rank * each
    collection = ProcessGroupCollection(
        ep=groups.ep_group, expt_tp=groups.singleton, tp_ep=groups.ep_group, expt_dp=groups.edp_group
    )
    kind = MoEAlltoAllTokenDispatcher if default_device().type == "cuda" else _PortableDispatcher
    return kind(each, list(range(first, first + each)), config, collection)


class _PortableDispatcher(MoEAlltoAllTokenDispatcher):
    """The same stages without CUDA: no streams, counts gathered and rows exchanged on the tensors' own device."""

    def __init__(
        self, num_local_experts: int, indices: list[int], config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _NO_STREAM  # or the constructor creates a CUDA stream
        super().__init__(num_local_experts, indices, config, groups)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Count rows per local expert, (E / ep_size,), and keep the splits that the next stages need. Communicates."""
        if self.drop_and_pad:
            fixed: Tensor = super().preprocess(routing_map)
            return fixed
        sent = routing_map.sum(0)
        gathered = sent.new_empty(self.ep_size * self.num_experts)
        dist.all_gather_into_tensor(gathered, sent, group=self.ep_group)
        first = self.local_expert_indices[0]
        received = gathered.view(self.ep_size, -1)[:, first : first + self.num_local_experts].contiguous()
        self.num_out_tokens = int(sent.sum())
        self.input_splits = sent.view(self.ep_size, -1).sum(1).tolist()
        self.output_splits = received.sum(1).tolist()
        self.num_global_tokens_per_local_expert = received
        return received.sum(0)

    def token_dispatch(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows and gates to their experts' ranks. Communicates."""
        sizes = self._sizes()
        return exchange(rows, self.ep_group, sizes), exchange(weights, self.ep_group, sizes)

    def token_combine(self, rows: Tensor, *unused: Any, **options: Any) -> Tensor:
        """Send outputs to their tokens' ranks. Communicates."""
        sizes = self._sizes()
        return exchange(rows, self.ep_group, sizes and sizes.reversed)

    def _sizes(self) -> SplitSizes | None:
        return None if self.drop_and_pad else SplitSizes(self.input_splits, self.output_splits)

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        return tokens_per_expert  # all counts are on the host already


_NO_STREAM = object()  # a placeholder for the constructor, which looks for a CUDA stream; never used
