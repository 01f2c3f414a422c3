"""Which samples a step takes: one bucket per step on all ranks, the sources of a mixture in turn, no state.

A run takes step after step, `global_batch` samples each, all of one bucket. Buckets take turns in proportion to their
samples, and inside a bucket the sources of a mixture take turns in proportion to their weights, sample by sample. So
the number of samples consumed determines how many were taken of every stream, as long as global batch and weights stay
the same. A checkpoint keeps those counts as well, so that a run can continue with another batch or other weights.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from data_pipeline.read.mixture import Stream
from data_pipeline.read.order import Turns
from sharpmoe.errors import DataError


class Start(NamedTuple):
    """Where a run continues; a checkpoint keeps it."""

    samples: int = 0  # consumed, over all ranks
    streams: tuple[int, ...] = ()  # of every stream; empty: determined by `samples`


class Pick(NamedTuple):
    """One sample of a step."""

    stream: int
    number: int  # how many samples of that stream the run has taken before


class BatchSchedule:
    """The steps of a run from `start` on."""

    def __init__(self, streams: Sequence[Stream], seed: int, global_batch: int, start: Start) -> None:
        """Raises DataError where `start` belongs to other streams, or does not determine the position of each."""
        self._global_batch = global_batch
        names = list(dict.fromkeys(stream.bucket for stream in streams))
        self._members = [[i for i, stream in enumerate(streams) if stream.bucket == name] for name in names]
        weights = [[streams[i].weight for i in members] for members in self._members]
        self._buckets = Turns([sum(inside, Fraction()) for inside in weights], seed)
        self._sources = [Turns(inside, seed, salt) for salt, inside in enumerate(weights, 1)]
        self._turn = start.samples // global_batch
        here = self._taken(self._turn)
        there = _consumed(start, here, global_batch)
        self._ahead = [more - less for more, less in zip(there, here, strict=True)]

    def picks(self, step: int, offsets: range) -> list[Pick]:
        """Return the samples at `offsets` of a step's global batch; steps count from the start."""
        bucket, before = next(self._buckets.after(self._turn + step))
        members = self._members[bucket]
        turns = self._sources[bucket].after(before * self._global_batch + offsets.start)
        taken = itertools.islice(turns, len(offsets))
        return [Pick(members[i], self._ahead[members[i]] + count) for i, count in taken]

    def counts(self, step: int) -> tuple[int, ...]:
        """Return how many samples the run has taken of every stream before a step."""
        taken = self._taken(self._turn + step)
        return tuple(ahead + count for ahead, count in zip(self._ahead, taken, strict=True))

    def _taken(self, turn: int) -> list[int]:
        """Return the samples of every stream in the first `turn` steps of a run whose settings never changed."""
        counts = [0] * sum(len(members) for members in self._members)
        for members, turns, steps in zip(self._members, self._sources, self._buckets.counts(turn), strict=True):
            for i, count in zip(members, turns.counts(steps * self._global_batch), strict=True):
                counts[i] = count
        return counts


def _consumed(start: Start, taken: Sequence[int], global_batch: int) -> Sequence[int]:
    """Return how much of every stream was consumed before `start`; `taken`: if the settings never changed."""
    if start.streams:
        if len(start.streams) != len(taken):
            raise DataError(
                f"the checkpoint counts {len(start.streams)} streams of samples, data.shards has {len(taken)}; "
                "name the shards it was trained on"
            )
        return start.streams
    if len(taken) == 1:
        return (start.samples,)
    if start.samples % global_batch:
        raise DataError(
            f"{start.samples} samples are not a whole number of steps of {global_batch}; "
            "set train.global_batch to its former value"
        )
    return taken
