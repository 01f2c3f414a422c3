"""Count what really goes over the wire: every collective that reaches a process group, whoever calls it.

The count is taken below torch.distributed, at the operators of c10d, so that DeepSpeed's cached functions, coalesced
calls and autograd's backward are seen like everything else.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One call on this rank."""

    name: str
    group_size: int
    size: int  # bytes of the whole message: all ranks' parts of a gather, one rank's tensor of a reduction
    sent: int  # bytes that must leave this rank, by the best known algorithm (a ring; a gather's or broadcast's root)


class CollectiveCounter(TorchDispatchMode):
    """Inside the context, notes this rank's collectives in `calls`; barriers and object counts are collectives too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            if name not in KINDS:
                raise NotImplementedError(f"no rule how to count c10d::{name}")
            self.calls.append(KINDS[name](args, group_of(args)))
        return func(*args, **(kwargs or {}))

    def count(self) -> Counter[str]:
        """Calls by name."""
        return Counter(call.name for call in self.calls)

    def sent(self, *names: str) -> int:
        """Bytes that left this rank, in all calls or in those of these names."""
        return sum(call.sent for call in self.calls if not names or call.name in names)

    def take(self) -> list[Collective]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def group_of(args: tuple[Any, ...]) -> ProcessGroup:
    """The group among an operator's arguments, which arrives as a TorchScript object."""
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    return ProcessGroup.unbox(boxed)


def bytes_of(value: object) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(bytes_of(part) for part in value) if isinstance(value, list | tuple) else 0


def gather(name: str) -> Callable[..., Collective]:
    """Every rank's part (second argument) goes to every other rank."""

    def note(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
        part = bytes_of(args[1])
        return Collective(name, group.size(), part * group.size(), part * (group.size() - 1))

    return note


def scatter_sum(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
    """Every rank keeps the sum of its part of the inputs (second argument)."""
    whole = bytes_of(args[1])
    return Collective("reduce_scatter", group.size(), whole, whole // group.size() * (group.size() - 1))


def all_reduce(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
    """A reduce-scatter and a gather."""
    whole = bytes_of(args[0])
    return Collective("all_reduce", group.size(), whole, 2 * whole * (group.size() - 1) // group.size())


def all_to_all(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
    """All rows but a rank's own leave it; without splits they are equal."""
    rows, splits = args[1], args[4]
    whole = bytes_of(rows)
    own = bytes_of(rows[: splits[group.rank()]]) if splits else whole // group.size()
    return Collective("all_to_all", group.size(), whole, whole - own)


def all_to_all_lists(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
    """One tensor for each rank."""
    whole = bytes_of(args[1])
    return Collective("all_to_all", group.size(), whole, whole - bytes_of(args[1][group.rank()]))


def rooted(name: str, sends: Callable[[int, bool, int], int], root_at: int) -> Callable[..., Collective]:
    """A call with a root (argument number `root_at`); `sends` gets the bytes, whether we are it, and the ranks."""

    def note(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
        whole = max(bytes_of(args[0]), bytes_of(args[1]) if isinstance(args[1], list) else 0)
        return Collective(name, group.size(), whole, sends(whole, group.rank() == args[root_at], group.size()))

    return note


def to_peer(name: str, sends: bool) -> Callable[..., Collective]:
    def note(args: tuple[Any, ...], group: ProcessGroup) -> Collective:
        whole = bytes_of(args[0])
        return Collective(name, group.size(), whole, whole if sends else 0)

    return note


def nothing(name: str) -> Callable[..., Collective]:
    return lambda args, group: Collective(name, group.size(), 0, 0)


def from_root(whole: int, is_root: bool, ranks: int) -> int:
    return whole if is_root and ranks > 1 else 0


def parts_from_root(whole: int, is_root: bool, ranks: int) -> int:
    return whole // ranks * (ranks - 1) if is_root else 0


def to_root(whole: int, is_root: bool, ranks: int) -> int:
    return 0 if is_root else whole


KINDS: dict[str, Callable[[tuple[Any, ...], ProcessGroup], Collective]] = {
    "allgather_": gather("all_gather"),
    "_allgather_base_": gather("all_gather"),
    "allgather_coalesced_": gather("all_gather"),
    "allgather_into_tensor_coalesced_": gather("all_gather"),
    "reduce_scatter_": scatter_sum,
    "_reduce_scatter_base_": scatter_sum,
    "reduce_scatter_tensor_coalesced_": scatter_sum,
    "allreduce_": all_reduce,
    "allreduce_coalesced_": all_reduce,
    "alltoall_base_": all_to_all,
    "alltoall_": all_to_all_lists,
    "broadcast_": rooted("broadcast", from_root, 2),
    "reduce_": rooted("reduce", to_root, 3),
    "scatter_": rooted("scatter", parts_from_root, 3),
    "gather_": rooted("gather", to_root, 3),
    "send": to_peer("send", True),
    "recv_": to_peer("recv", False),
    "recv_any_source_": to_peer("recv", False),
    "barrier": nothing("barrier"),
    "monitored_barrier_": nothing("barrier"),
}
