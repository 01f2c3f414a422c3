"""What is wrong with shards, by name, and how much of it a run bears."""

from collections.abc import Iterable
from typing import NamedTuple

from sharpmoe.errors import DamageError

MEND = "delete the shard and run launcher/prepare.py again as before: it writes only what is missing"


class Damage(NamedTuple):
    """One sample that cannot be used; or, with an empty key, a flaw of a shard that costs no sample by itself."""

    shard: str  # its tar, with the place it lies in
    key: str
    what: str  # with the member, where it is one

    def __str__(self) -> str:
        """One line, without the mend."""
        return f"{self.shard}, key {self.key}, {self.what}" if self.key else f"{self.shard}: {self.what}"

    def error(self) -> DamageError:
        """The error of a reader that bears no damage."""
        return DamageError(f"{self}; {MEND}")


class Ledger:
    """All damage that was met so far, each once. The same wherever the same is added."""

    def __init__(self, num_samples: int, max_bad_fraction: float) -> None:
        """`num_samples` of the data: the fraction is of them, not of what was read so far."""
        self._num_samples, self._max_bad_fraction = num_samples, max_bad_fraction
        self._known: set[Damage] = set()

    @property
    def num_bad(self) -> int:
        """Samples found damaged."""
        return sum(bool(damage.key) for damage in self._known)

    def add(self, met: Iterable[Damage]) -> list[Damage]:
        """Count what was met; returns what is new, in a fixed order.

        Raises DamageError where more than max_bad_fraction of all samples are damaged; where it is 0, for any damage.
        """
        fresh = sorted(set(met) - self._known)
        self._known.update(fresh)
        if fresh and not self._max_bad_fraction:
            raise fresh[0].error()
        if self.num_bad > self._num_samples * self._max_bad_fraction:
            raise DamageError(
                f"{self.num_bad} of {self._num_samples} samples are damaged, more than data.max_bad_fraction "
                f"{self._max_bad_fraction} bears; the latest: {fresh[-1]}; {MEND}"
            )
        return fresh
