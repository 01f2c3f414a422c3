"""Dispatchers over several ranks: tokens travel to the ranks that hold their experts, the answers travel back.

An expert-parallel group shares the experts of a layer: its rank r holds the r-th run of E / ep_size experts.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharpmoe.config import RunConfig
from sharpmoe.moe.dispatch import Choices, Dispatcher, LocalDispatcher, check_equal_counts, combine, find_choices, take
from sharpmoe.moe.experts import Experts
from sharpmoe.parallel.experts.exchange import Sizes, exchange
from sharpmoe.parallel.experts.groups import ExpertGroups


def make_dispatcher(run: RunConfig, groups: ExpertGroups) -> Dispatcher:
    """The dispatcher that a run asks for. No communication."""
    if run.parallel.dispatcher == "megatron":
        # Imported only where it is asked for: Megatron-core takes more than three seconds to import.
        from sharpmoe.parallel.experts.megatron import MegatronDispatcher  # noqa: PLC0415

        return MegatronDispatcher(groups, run.model.total_experts, run.model.width)
    if groups.ep_size == 1:
        return LocalDispatcher()
    return NativeDispatcher(groups.ep_group, run.model.total_experts)


class NativeDispatcher:
    """All-to-all on one process group.

    Every rank of the group makes the same calls, each on its own tokens: none at all is fine. Where `rows_per_expert`
    is given it is the same on all ranks of the group (equal shapes), nothing is read back from the device, and two
    all-to-alls move the rows. Otherwise one more, of the counts, goes before them, and the host reads them once. In
    both cases backward takes two. Rows travel in the dtype of x; no gate does.
    """

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        self._group, self._num_experts, self._ranks = group, num_experts, dist.get_world_size(group)
        assert num_experts % self._ranks == 0  # check_ep_size

    def __call__(
        self,
        x: Tensor,
        routing_map: Tensor,
        gates: Tensor,
        experts: Experts,
        rows_per_expert: int | None,
        total: int | None = None,
    ) -> Tensor:
        """See `Dispatcher`. `experts` holds this rank's part. Communicates on the group, in backward too.

        `total` is of no use here: what comes from other ranks has no fixed number of rows.
        """
        assert routing_map.shape[1] == self._num_experts
        if rows_per_expert is None:
            out, choices = self._varying(x, routing_map, experts)
        else:
            out, choices = self._equal(x, routing_map, experts, rows_per_expert)
        return combine(out, choices, gates)

    def _varying(self, x: Tensor, routing_map: Tensor, experts: Experts) -> tuple[Tensor, Choices]:
        sent = routing_map.sum(0)
        received = torch.empty_like(sent)  # by source rank, then local expert
        dist.all_to_all_single(received, sent, group=self._group)
        # The one moment at which the host waits for the device.
        sizes = torch.stack([sent, received]).view(2, self._ranks, -1).sum(-1).tolist()
        choices = find_choices(routing_map, sum(sizes[0]))
        rows = exchange(take(x, choices), self._group, Sizes(*sizes))
        order = chunk_order(received.view(self._ranks, -1), sum(sizes[1]))
        out = experts(rows.index_select(0, order.by_expert), received.view(self._ranks, -1).sum(0))
        return exchange(out.index_select(0, order.by_rank), self._group, Sizes(sizes[1], sizes[0])), choices

    def _equal(self, x: Tensor, routing_map: Tensor, experts: Experts, each: int) -> tuple[Tensor, Choices]:
        check_equal_counts(routing_map, each)
        choices = find_choices(routing_map, each * self._num_experts)
        rows = exchange(take(x, choices), self._group, None)
        local, width = self._num_experts // self._ranks, x.shape[1]
        by_rank = rows.view(self._ranks, local, each, width)
        out = experts(by_rank.transpose(0, 1).reshape(rows.shape), self._ranks * each)
        by_expert = out.view(local, self._ranks, each, width)
        return exchange(by_expert.transpose(0, 1).reshape(rows.shape), self._group, None), choices


class Order(NamedTuple):
    """Two inverse permutations of received rows (P,): into order by expert, and back to order by source rank."""

    by_expert: Tensor
    by_rank: Tensor


def chunk_order(counts: Tensor, total: int) -> Order:
    """How to regroup `total` rows that lie by source rank, then expert: counts (ranks, experts). Does not sort rows."""
    ends = counts.flatten().cumsum(0).view_as(counts)
    ends_by_expert = counts.t().flatten().cumsum(0).view_as(counts.t())
    shift = (ends - ends_by_expert.t()).t().flatten()  # of each chunk, from its new place to its old one
    place = torch.arange(total, device=counts.device)
    by_expert = place + shift.repeat_interleave(counts.t().flatten(), output_size=total)
    by_rank = place - shift.view_as(counts.t()).t().flatten().repeat_interleave(counts.flatten(), output_size=total)
    return Order(by_expert, by_rank)
