"""Dispatchers over several ranks: tokens travel to the ranks that hold their experts, the outputs travel back.

An expert-parallel group shares the experts of a layer: its rank r holds the r-th run of E / ep_size experts.
"""

import importlib.util
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.moe.dispatch import (
    Assignment,
    Dispatched,
    Dispatcher,
    LocalDispatcher,
    Pairs,
    check_equal_counts,
)
from sharpmoe.parallel.experts.exchange import SplitSizes, exchange
from sharpmoe.parallel.experts.groups import ExpertGroups


def make_dispatcher(run: RunConfig, groups: ExpertGroups) -> Dispatcher:
    """Build the dispatcher that parallel.dispatcher names. No communication. Raises ConfigError: `check_dispatcher`."""
    check_dispatcher(run)
    if run.parallel.dispatcher == "megatron":
        # Imported only where it is used: Megatron-core takes more than three seconds to import.
        from sharpmoe.parallel.experts.megatron import MegatronDispatcher  # noqa: PLC0415

        return MegatronDispatcher(groups, run.model.total_experts, run.model.width)
    if groups.ep_size == 1:
        return LocalDispatcher()
    return _NativeDispatcher(groups.ep_group, run.model.total_experts)


def check_dispatcher(run: RunConfig) -> None:
    """Raise ConfigError where the package of parallel.dispatcher is not installed."""
    if run.parallel.dispatcher == "megatron" and not _is_installed("megatron.core"):
        raise ConfigError(
            "parallel.dispatcher: megatron needs the package megatron-core, which is not installed; install it, or use "
            "parallel.dispatcher: native"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it is in
        return False


class _NativeDispatcher:
    """All-to-all on one process group, in forward and backward.

    Every rank of the group makes the same calls, each on its own tokens: none at all is fine. Where the counts per
    expert are fixed they are the same on all ranks of the group (equal shapes), nothing is read back from the device,
    and two all-to-alls move the rows, one in `dispatch` and one in `combine`. Otherwise one more, of the counts, goes
    before them, and the host reads them once; a fixed total does not help, for what comes from other ranks varies. In
    both cases backward takes two. Rows travel in the dtype of x; gates do not travel.
    """

    def __init__(self, group: ProcessGroup, num_experts: int) -> None:
        self._group, self._num_experts, self._ranks = group, num_experts, dist.get_world_size(group)
        assert num_experts % self._ranks == 0  # check_ep_size

    def dispatch(self, x: Tensor, assignment: Assignment) -> Dispatched:
        """Send tokens x (R, D) to the ranks of their experts. Communicates on the group, in backward too."""
        assert assignment.routing_map.shape[1] == self._num_experts
        per_expert = assignment.counts.per_expert
        return self._varying(x, assignment) if per_expert is None else self._equal(x, assignment, per_expert)

    def combine(self, out: Tensor, ticket: "_Ticket") -> Tensor:
        """Send outputs (P, D) back to their tokens' rank and sum them. Communicates on the group, in backward too."""
        if ticket.varying is None:
            local, width = self._num_experts // self._ranks, out.shape[1]
            by_expert = out.view(local, self._ranks, ticket.per_expert, width)
            answers = exchange(by_expert.transpose(0, 1).reshape(out.shape), self._group, None)
        else:
            order, sizes = ticket.varying
            answers = exchange(out.index_select(0, order.by_rank), self._group, sizes.reversed)
        return ticket.pairs.combine(answers, ticket.gates)

    def _varying(self, x: Tensor, assignment: Assignment) -> Dispatched:
        sent = assignment.routing_map.sum(0)
        received = torch.empty_like(sent)  # by source rank, then local expert
        dist.all_to_all_single(received, sent, group=self._group)
        # The one moment at which the host waits for the device.
        sizes = SplitSizes(*torch.stack([sent, received]).view(2, self._ranks, -1).sum(-1).tolist())
        pairs = Pairs.find(assignment.routing_map, sum(sizes.sent))
        rows = exchange(pairs.take(x), self._group, sizes)
        by_rank = received.view(self._ranks, -1)
        order = _regroup(by_rank, sum(sizes.received))
        ticket = _Ticket(pairs, assignment.gates, varying=(order, sizes))
        return Dispatched(rows.index_select(0, order.by_expert), by_rank.sum(0), ticket)

    def _equal(self, x: Tensor, assignment: Assignment, per_expert: int) -> Dispatched:
        check_equal_counts(assignment)
        pairs = Pairs.find(assignment.routing_map, per_expert * self._num_experts)
        rows = exchange(pairs.take(x), self._group, None)
        by_rank = rows.view(self._ranks, self._num_experts // self._ranks, per_expert, x.shape[1])
        ticket = _Ticket(pairs, assignment.gates, per_expert=per_expert)
        return Dispatched(by_rank.transpose(0, 1).reshape(rows.shape), self._ranks * per_expert, ticket)


class _Regrouping(NamedTuple):
    """Two inverse permutations of received rows (P,): into order by expert, and back to order by source rank."""

    by_expert: Tensor
    by_rank: Tensor


class _Ticket(NamedTuple):
    """What `_NativeDispatcher.combine` needs of its `dispatch`; either the count per expert, or how rows were sent."""

    pairs: Pairs
    gates: Tensor  # (R, E)
    per_expert: int = 0
    varying: tuple[_Regrouping, SplitSizes] | None = None


def _regroup(counts: Tensor, total: int) -> _Regrouping:
    """How to regroup `total` rows that lie by source rank, then expert: counts (ranks, experts). Does not sort rows."""
    ends = counts.flatten().cumsum(0).view_as(counts)
    ends_by_expert = counts.t().flatten().cumsum(0).view_as(counts.t())
    shift = (ends - ends_by_expert.t()).t().flatten()  # of each chunk, from its new place to its old one
    place = torch.arange(total, device=counts.device)
    by_expert = place + shift.repeat_interleave(counts.t().flatten(), output_size=total)
    by_rank = place - shift.view_as(counts.t()).t().flatten().repeat_interleave(counts.flatten(), output_size=total)
    return _Regrouping(by_expert, by_rank)
