"""The differentiable all-to-all of rows on one process group."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class SplitSizes(NamedTuple):
    """Rows that go to each rank of a group and come from it."""

    sent: list[int]
    received: list[int]

    @property
    def reversed(self) -> "SplitSizes":
        """The sizes of the way back."""
        return SplitSizes(self.received, self.sent)


def exchange(rows: Tensor, group: ProcessGroup, sizes: SplitSizes | None) -> Tensor:
    """All-to-all of rows (P, ...), those for rank 0 first; without sizes every rank gets P / ranks. Differentiable."""
    if dist.get_world_size(group) == 1:
        return rows
    out: Tensor = _Exchange.apply(rows, group, sizes)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup, sizes: SplitSizes | None) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        out = rows.new_empty(len(rows) if sizes is None else sum(sizes.received), *rows.shape[1:])
        received, sent = (None, None) if sizes is None else (sizes.received, sizes.sent)
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        back = None if ctx.sizes is None else ctx.sizes.reversed
        return _Exchange.apply(gradients[0], ctx.group, back), None, None
