"""Which tokens compete in training, for families that choose over a call (`Family.pools_calls`).

A pool is a plain object. The default pool is the call: the micro-batch of one rank at one rollout step, so that the
distribution of experts over ranks does not change the mathematics.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Pool(Protocol):
    """The tokens among which a selection rule chooses."""

    def choose(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `rule` to the scores (B, N, E) of the whole pool; returns the call's own choices (B, N, E) bool."""
        ...

    def lowest(self, cutoff: Tensor) -> Tensor:
        """Return the lowest accepted score over the pool, from that of the call (1, 1, E)."""
        ...

    @property
    def is_call(self) -> bool:
        """Whether the pool is the call itself, so that the row counts that a rule fixes are those of the call."""
        ...


class CallPool:
    """The tokens of the call. No communication."""

    is_call = True

    def choose(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        return rule(scores)

    def lowest(self, cutoff: Tensor) -> Tensor:
        return cutoff
