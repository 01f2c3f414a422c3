"""What is wrong with shards, by name, and how much of it a run accepts."""

from collections.abc import Iterable
from typing import NamedTuple

from sharpmoe.errors import DamageError
from sharpmoe.invocation import spell_command


def how_to_rewrite() -> str:
    """Return what repairs a prepared folder, for messages."""
    return f"run `{spell_command('prepare')}` again as before: it writes only what is missing"


class Damage(NamedTuple):
    """One sample that cannot be used; or, with an empty key, a flaw of a shard that makes no sample unusable."""

    shard: str  # its tar, with folder or URL
    key: str
    what: str  # with the name of the member, where it concerns one

    def __str__(self) -> str:
        """Return one line, without the way to fix it."""
        return f"{self.shard}, key {self.key}, {self.what}" if self.key else f"{self.shard}: {self.what}"

    def error(self) -> DamageError:
        """Return the error of a reader that accepts no damage."""
        return DamageError(f"{self}; delete the shard and {how_to_rewrite()}")


class DamageLedger:
    """All damage found so far, each once. Ranks that add the same damage raise the same error."""

    def __init__(self, num_samples: int, max_bad_fraction: float) -> None:
        """`num_samples` of the data: the fraction is of them, not of what was read so far."""
        self._num_samples, self._max_bad_fraction = num_samples, max_bad_fraction
        self._known: set[Damage] = set()

    @property
    def num_bad(self) -> int:
        """Number of samples found damaged."""
        return sum(bool(damage.key) for damage in self._known)

    def add(self, found: Iterable[Damage]) -> list[Damage]:
        """Add what was found; return what is new, in a fixed order.

        Raises DamageError where more than max_bad_fraction of all samples are damaged; where it is 0, for any damage.
        """
        fresh = sorted(set(found) - self._known)
        self._known.update(fresh)
        if fresh and not self._max_bad_fraction:
            raise fresh[0].error()
        if self.num_bad > self._num_samples * self._max_bad_fraction:
            raise DamageError(
                f"{self.num_bad} of {self._num_samples} samples are damaged, more than data.max_bad_fraction "
                f"{self._max_bad_fraction} allows; the latest: {fresh[-1]}; delete the shard and {how_to_rewrite()}"
            )
        return fresh
