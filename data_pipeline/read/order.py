"""Which sample comes when: pure functions of the seed and a position in the run, without state or communication.

An epoch of a stream of samples is a permutation of its shards, and within every block of a few shards in that order a
permutation of their samples, which keeps reads near each other. No array is as long as the epoch: a block is drawn
when it is needed. The draws are raw words of Philox, which are the same in every version of numpy.
"""

import itertools
from collections.abc import Iterator, Sequence
from enum import IntEnum
from fractions import Fraction
from heapq import heapify, heapreplace
from math import lcm
from typing import NamedTuple, TypeVar

import numpy as np

_K = TypeVar("_K")
_V = TypeVar("_V")
_BLOCK_SHARDS = 4  # samples are mixed within blocks of so many shards
_EPOCHS, _BLOCKS = 2, 4  # kept in memory: a batch may span two
_FINE = 2**16  # time steps per turn


class DataPurpose(IntEnum):
    """What a random draw is for; the numbers below 100 belong to sharpmoe.draws."""

    SHARDS = 101
    BLOCK = 102
    PHASE = 103
    CAPTION = 104
    FLIP = 105
    LATENT = 106


def data_generator(seed: int, purpose: DataPurpose, first: int, second: int = 0) -> np.random.Generator:
    """Return the generator of one (seed, purpose, position)."""
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, first, second]))


def _permutation(count: int, seed: int, purpose: DataPurpose, first: int, second: int = 0) -> np.ndarray:
    """Return a permutation of range(count), (count,) int64, that never changes between versions."""
    raw = np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, first, second]).random_raw(count)
    return np.argsort(raw, kind="stable")


def uniform(seed: int, purpose: DataPurpose, position: int) -> float:
    """Return a number in [0, 1) with 53 bits, that never changes between versions."""
    raw = np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, position, 0]).random_raw()
    return float(int(raw) >> 11) / 2.0**53


class Visit(NamedTuple):
    """One sample in one epoch."""

    epoch: int
    sample: int  # its index


class _Epoch(NamedTuple):
    shards: np.ndarray  # in the order of this epoch
    first: np.ndarray  # position of the first sample of every block; the number of samples at the end


class SampleOrder:
    """The endless order of the samples of some shards; sample indices count through the shards as they are given."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, block: int = _BLOCK_SHARDS) -> None:
        """`shard_sizes`: samples of every shard; `block`: shards whose samples are mixed."""
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._block = seed, block
        self.num_samples = int(self._first[-1])
        self._epochs: dict[int, _Epoch] = {}
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    def at(self, number: int) -> Visit:
        """Return the `number`-th sample (from 0) of the stream."""
        epoch, place = divmod(number, self.num_samples)
        first = self._epoch(epoch).first
        block = int(np.searchsorted(first, place, side="right")) - 1
        return Visit(epoch, int(self._samples(epoch, block)[place - int(first[block])]))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = _permutation(len(self._sizes), self._seed, DataPurpose.SHARDS, epoch)
            shards = shards[self._sizes[shards] > 0]
            ends = np.cumsum(np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self._block)))
            _keep(self._epochs, epoch, _Epoch(shards, np.concatenate([[0], ends])), _EPOCHS)
        return self._epochs[epoch]

    def _samples(self, epoch: int, block: int) -> np.ndarray:
        if (epoch, block) not in self._blocks:
            shards = self._epoch(epoch).shards[block * self._block : (block + 1) * self._block]
            samples = np.concatenate([np.arange(self._first[shard], self._first[shard + 1]) for shard in shards])
            mixed = samples[_permutation(len(samples), self._seed, DataPurpose.BLOCK, epoch, block)]
            _keep(self._blocks, (epoch, block), mixed, _BLOCKS)
        return self._blocks[epoch, block]


class Turns:
    """Streams take turns in proportion to their weights: after n turns each had n times its share, up to two.

    Stream i has its j-th turn at time (j + u_i) / w_i, where u_i is drawn from the seed; turns are in order of time.
    All numbers are integers, so that every machine takes the same turns.
    """

    def __init__(self, weights: Sequence[int | float | Fraction], seed: int, salt: int = 0) -> None:
        """`salt` distinguishes several instances of one run."""
        shares = [Fraction(weight) for weight in weights]
        whole = [int(share * lcm(*(share.denominator for share in shares))) for share in shares]
        common = lcm(*whole)
        raw = np.random.Philox(key=[seed, int(DataPurpose.PHASE)], counter=[0, 0, salt, 0]).random_raw(len(whole))
        self._every = [_FINE * (common // weight) for weight in whole]  # time between two turns of a stream
        self._begin = [int(word) % _FINE * (common // weight) for word, weight in zip(raw, whole, strict=True)]
        self._total, self._common = sum(whole), common

    def counts(self, turn: int) -> list[int]:
        """Return how many of the first `turn` turns each stream had."""
        if len(self._every) == 1:
            return [turn]
        counts = self._before(turn)
        for stream, count in itertools.islice(self._from(counts), turn - sum(counts)):
            counts[stream] = count + 1
        return counts

    def after(self, turn: int) -> Iterator[tuple[int, int]]:
        """Yield the turns from `turn` on, without end: (stream, how many it had before)."""
        if len(self._every) == 1:
            return ((0, number) for number in itertools.count(turn))
        return self._from(self.counts(turn))

    def _before(self, turn: int) -> list[int]:
        """Return counts at a time before which there are at most `turn` turns, and not many fewer."""
        time = max(0, turn - len(self._every)) * _FINE * self._common // self._total
        pairs = zip(self._begin, self._every, strict=True)
        return [max(0, -((begin - time) // every)) for begin, every in pairs]

    def _from(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        line = [
            (self._begin[i] + count * self._every[i], i, count) for i, count in enumerate(counts)
        ]  # (time of the next turn, stream, its count)
        heapify(line)
        while True:
            time, stream, count = line[0]
            yield stream, count
            heapreplace(line, (time + self._every[stream], stream, count + 1))


def _keep(kept: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Add to a dict of which the latest `most` entries are kept."""
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value
