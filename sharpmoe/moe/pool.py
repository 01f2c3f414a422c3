"""Which tokens compete for an expert in training, for families that choose from a pool (DiffMoE, Expert Race).

A pool is a plain object; the default one is the call: one rank's micro-batch at one rollout step, so that the way
the experts are laid out over ranks does not change the mathematics.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Pool(Protocol):
    """The tokens among which a selection rule chooses."""

    def choose(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a rule of `moe.routing` to the pool of scores (B, N, E); returns the call's own part (B, N, E) bool."""
        ...

    def lowest(self, cutoff: Tensor) -> Tensor:
        """Lowest accepted score over the pool, of the call's own (1, 1, E)."""
        ...

    @property
    def is_call(self) -> bool:
        """Whether the pool is the call itself: the rule then fixes how many tokens of the call each expert takes."""
        ...


class CallPool:
    """The tokens of the call. No communication."""

    is_call = True

    def choose(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Pool`."""
        return rule(scores)

    def lowest(self, cutoff: Tensor) -> Tensor:
        """See `Pool`."""
        return cutoff
