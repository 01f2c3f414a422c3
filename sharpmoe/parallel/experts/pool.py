"""The pool of all ranks: selection over the global batch of one rollout step (parallel.pool_scope: world)."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.moe.pool import CallPool, Pool
from sharpmoe.parallel.ranks.launch import World


class _WorldPool:
    """The tokens of all data-parallel ranks in the same call. Every rank calls each method; scores have no gradient.

    Cost: one all-gather of B N E float32 per MoE layer and rollout step, and experts whose rows per rank vary.
    """

    is_call = False

    def __init__(self, world: World) -> None:
        self._world = world

    def choose(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a rule to all ranks' scores (B, N, E), in rank order; all ranks have the same B. Communicates."""
        whole = scores.new_empty(self._world.size * scores.shape[0], *scores.shape[1:])
        dist.all_gather_into_tensor(whole, scores.contiguous())
        return rule(whole).chunk(self._world.size)[self._world.rank]

    def lowest(self, cutoff: Tensor) -> Tensor:
        """Return the minimum over ranks. Communicates."""
        lowest = cutoff.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return lowest


def make_pool(run: RunConfig, world: World) -> Pool:
    """Build the pool that parallel.pool_scope names."""
    return _WorldPool(world) if run.parallel.pool_scope == "world" and world.size > 1 else CallPool()
