"""The order of an epoch and the turns of streams: permutations, fixed for ever, and cheap however long the epoch is."""

import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.read.order import SampleOrder, Turns, Visit

FIXED = [4, 2, 6, 7, 5, 1, 3, 0]


def epoch(order: SampleOrder, number: int) -> list[int]:
    start = number * order.num_samples
    return [order.at(place).sample for place in range(start, start + order.num_samples)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 2**63), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(sizes: list[int], seed: int, block: int) -> None:
    order = SampleOrder(sizes, seed, block)
    for number in (0, 1, 7):
        assert sorted(epoch(order, number)) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch(SampleOrder((5, 3, 0, 7), 1), number) for number in range(3)] + [
        epoch(SampleOrder((5, 3, 0, 7), 2), 0)
    ]
    assert len({tuple(one) for one in orders}) == 4


def test_the_order_is_fixed_for_ever() -> None:
    assert epoch(SampleOrder((3, 3, 2), 7), 1) == FIXED
    assert [SampleOrder((3, 3, 2), 7).at(8 + place) for place in (7, 0)] == [Visit(1, FIXED[7]), Visit(1, FIXED[0])]


def test_samples_stay_within_blocks_of_shards() -> None:
    shard_of = np.repeat(np.arange(6), 10)
    blocks = np.array(epoch(SampleOrder((10,) * 6, 0, block=2), 0)).reshape(3, 20)
    assert all(len(set(shard_of[block])) == 2 for block in blocks)


def test_a_long_epoch_is_never_written_out() -> None:
    order = SampleOrder([1000] * 10_000, 3)  # ten million samples: 80 MB as one array
    tracemalloc.start()
    seen = {order.at(place).sample for place in itertools.chain(range(9_990_000, 9_990_100), range(50))}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 150
    assert peak < 4 << 20


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_turns_may_be_entered_anywhere(weights: list[int], seed: int, start: int) -> None:
    turns = Turns(weights, seed)
    counts = turns.counts(start)
    assert sum(counts) == start
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    assert all(abs(count - start * share) < 2 for count, share in zip(counts, shares, strict=True))
    for stream, before in itertools.islice(turns.after(start), 20):
        assert counts[stream] == before
        counts[stream] += 1
    assert turns.counts(start + 20) == counts


def test_turns_are_those_of_the_weights() -> None:
    taken = Counter(stream for stream, _ in itertools.islice(Turns([0.7, 0.2, 0.1], 5).after(0), 10_000))
    assert all(abs(taken[i] - count) <= 2 for i, count in enumerate((7000, 2000, 1000)))


def test_far_turns_cost_nothing() -> None:
    assert sum(Turns([1, 2**40 + 1, 3.7], 1).counts(10**15)) == 10**15
