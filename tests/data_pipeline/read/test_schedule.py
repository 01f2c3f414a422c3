"""What makes a step: one bucket for all ranks, sources in proportion, counts that say where every stream is."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.read.mixture import Stream
from data_pipeline.read.schedule import BatchSchedule, Pick, Start
from sharpmoe.errors import DataError

# Two sources; the first has two buckets.
STREAMS = (
    Stream(0, "16x16", 0, (30, 30), Fraction(6, 10)),
    Stream(0, "32x8", 60, (20,), Fraction(2, 10)),
    Stream(1, "16x16", 0, (40,), Fraction(2, 10)),
)


def step_picks(schedule: BatchSchedule, step: int, batch: int, world: int = 1) -> list[Pick]:
    shares = [range(rank * batch // world, (rank + 1) * batch // world) for rank in range(world)]
    return [pick for share in shares for pick in schedule.picks(step, share)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_is_of_one_bucket_and_the_same_on_every_layout(world: int) -> None:
    schedule = BatchSchedule(STREAMS, 3, 8, Start())
    for step in range(40):
        picks = step_picks(schedule, step, 8, world)
        assert picks == step_picks(schedule, step, 8)
        assert len({STREAMS[pick.stream].bucket for pick in picks}) == 1


def test_every_stream_is_taken_in_order_without_a_gap() -> None:
    schedule = BatchSchedule(STREAMS, 3, 8, Start())
    numbers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(60):
        assert schedule.counts(step) == tuple(len(numbers[stream]) for stream in numbers)
        for stream, number in step_picks(schedule, step, 8):
            numbers[stream].append(number)
    assert all(taken == list(range(len(taken))) for taken in numbers.values())
    shares = [len(taken) / 480 for taken in numbers.values()]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.04)


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_resumed_run_goes_on(step: int, batch: int, seed: int) -> None:
    whole = BatchSchedule(STREAMS, seed, batch, Start())
    for streams in ((), whole.counts(step)):  # older checkpoints have no counts
        resumed = BatchSchedule(STREAMS, seed, batch, Start(step * batch, streams))
        assert step_picks(resumed, 0, batch) == step_picks(whole, step, batch)
        assert resumed.counts(2) == whole.counts(step + 2)


@pytest.mark.parametrize("batch", [4, 6, 24])
def test_another_batch_goes_on_from_every_count(batch: int) -> None:
    before = BatchSchedule(STREAMS, 3, 8, Start())
    start = Start(7 * 8, before.counts(7))
    after = BatchSchedule(STREAMS, 3, batch, start)
    assert after.counts(0) == start.streams
    taken = Counter[int]()
    for step in range(30):
        for stream, number in step_picks(after, step, batch):
            assert number == start.streams[stream] + taken[stream]
            taken[stream] += 1
    again = BatchSchedule(STREAMS, 3, batch, Start(start.samples + 30 * batch, after.counts(30)))
    assert step_picks(again, 0, batch) == step_picks(after, 30, batch)


def test_other_weights_go_on_from_every_count() -> None:
    before = BatchSchedule(STREAMS, 3, 8, Start())
    start = Start(800, before.counts(100))
    changed = (*STREAMS[:2], STREAMS[2]._replace(weight=Fraction(6, 10)))
    after = BatchSchedule(changed, 3, 8, start)
    more = [now - then for now, then in zip(after.counts(100), start.streams, strict=True)]
    assert more == pytest.approx([343, 114, 343], abs=20)  # by the new weights from here on, not to make up for the old


def test_one_stream_needs_no_counts() -> None:
    schedule = BatchSchedule(STREAMS[:1], 3, 8, Start(13))
    assert schedule.picks(2, range(3, 5)) == [Pick(0, 13 + 16 + 3), Pick(0, 13 + 16 + 4)]
    assert schedule.counts(1) == (21,)


def test_what_cannot_be_gone_on_from() -> None:
    with pytest.raises(DataError, match="13 samples are not a whole number of steps of 8; set train.global_batch"):
        BatchSchedule(STREAMS, 3, 8, Start(13))
    with pytest.raises(DataError, match="counts 2 streams of samples, data.shards has 3"):
        BatchSchedule(STREAMS, 3, 8, Start(16, (8, 8)))


def test_buckets_of_all_sizes_come_up() -> None:
    uneven = [Stream(0, f"b{i}", 0, (size,), Fraction(size)) for i, size in enumerate((100_000, 1000, 10))]
    schedule = BatchSchedule(uneven, 0, 10, Start())
    counts = schedule.counts(10_101)  # one epoch
    assert [abs(count - size) <= 20 for count, size in zip(counts, (100_000, 1000, 10), strict=True)] == [True] * 3
    buckets = [schedule.picks(step, range(1))[0].stream for step in itertools.islice(itertools.count(), 300)]
    assert {0, 1} <= set(buckets)
