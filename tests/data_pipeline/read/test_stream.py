"""The batches of a run: shares of ranks, buckets, mixtures, workers."""

import itertools
import threading
from collections import Counter

import pytest
import torch

from data_pipeline.read.damage import Damage
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.samples import Draw, Sample
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import Loaded, stream
from data_pipeline.schema import Batch
from sharpmoe.errors import DamageError
from tests.memory_shards import Options, open_files, write

ROWS = [("16x16", 8), ("16x16", 7), ("16x16", 5)]


@pytest.fixture(scope="module")
def shards() -> ShardSet:
    return open_files(write(ROWS))


def steps(
    data: ShardSet | Mixture,
    count: int,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = 2,
    start: int = 0,
    workers: int = 0,
) -> list[Loaded]:
    loaded = stream(
        data, seed=3, global_batch=8, micro_batch=micro, rank=rank, world=world, start=start, num_workers=workers
    )
    return list(itertools.islice(loaded, count))


def keys(read: list[Loaded]) -> list[str]:
    return [key for step in read for batch in step.batches for key in batch.keys]


def same(ours: Batch, theirs: Batch) -> bool:
    equal = [torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(ours[:8], theirs[:8], strict=True)]
    return all(equal) and ours[8:] == theirs[8:]


def test_one_rank_reads_positions_in_order(shards: ShardSet) -> None:
    read = steps(shards, 5)
    assert [len(step.batches) for step in read] == [4] * 5
    places = [[place for batch in step.batches for place in batch.position.tolist()] for step in read]
    assert places == [list(range(8 * step, 8 * step + 8)) for step in range(5)]
    assert [step.consumed.samples for step in read] == [8, 16, 24, 32, 40]
    assert read[-1].consumed.streams == (40,)


def test_every_epoch_holds_every_sample_once(shards: ShardSet) -> None:
    read = keys(steps(shards, 10))  # 80 positions, 20 samples
    assert all(Counter(read[start : start + 20]) == Counter(read[:20]) for start in (20, 40, 60))
    assert len(set(read[:20])) == 20
    assert len({tuple(read[start : start + 20]) for start in (0, 20, 40, 60)}) == 4


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches_equally(shards: ShardSet, world: int) -> None:
    alone = steps(shards, 6)
    ranks = [steps(shards, 6, rank=rank, world=world) for rank in range(world)]
    for step in range(6):
        assert [len(rank[step].batches) for rank in ranks] == [4 // world] * world
        together = [batch for rank in ranks for batch in rank[step].batches]
        assert all(same(ours, theirs) for ours, theirs in zip(together, alone[step].batches, strict=True))


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_the_micro_batch_only_cuts(shards: ShardSet, micro: int) -> None:
    assert keys(steps(shards, 6, micro=micro)) == keys(steps(shards, 6))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    data = open_files(write(ROWS, Options(captions=(1, 2), spread=True, flip=True)))
    alone, helped = steps(data, 6, start=16), steps(data, 6, start=16, workers=workers)
    for ours, theirs in zip(helped, alone, strict=True):
        assert isinstance(ours, Loaded)
        assert (ours.damage, ours.consumed) == (theirs.damage, theirs.consumed)
        assert all(isinstance(batch, Batch) and isinstance(batch.keys, tuple) for batch in ours.batches)
        assert all(same(a, b) for a, b in zip(ours.batches, theirs.batches, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_line_from_workers_too(workers: int) -> None:
    files = write(ROWS)
    for name in files:
        if name.endswith(".tar"):
            files[name] = b"\xff" * len(files[name])
    with pytest.raises(DamageError, match=r"memory/train-16x16-0000\d.tar: the tar is damaged") as error:
        steps(open_files(files), 1, workers=workers)
    assert "\n" not in str(error.value)


def test_it_reads_ahead_while_the_trainer_works() -> None:
    data, ahead = open_files(write(ROWS)), threading.Event()
    load = data.load

    def watched(index: int, draw: Draw | None = None) -> Sample | Damage:
        if draw is not None and draw.position >= 16:  # the third step
            ahead.set()
        return load(index, draw)

    data.load = watched  # type: ignore[method-assign]
    batches = stream(data, seed=3, global_batch=8, micro_batch=2, rank=0, world=1)
    assert next(batches).batches[0].position.tolist() == [0, 1]
    assert ahead.wait(60)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_an_error_of_the_code_is_not_swallowed(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.read.stream.collate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps(shards, 1)


@pytest.mark.parametrize(("rank", "world", "micro"), [(0, 1, 3), (0, 3, 1), (2, 2, 2), (-1, 1, 2)])
def test_uneven_shares_are_refused_at_once(shards: ShardSet, rank: int, world: int, micro: int) -> None:
    with pytest.raises(ValueError, match="global batch 8"):
        stream(shards, seed=0, global_batch=8, micro_batch=micro, rank=rank, world=world)


def test_a_batch_is_of_one_bucket_on_all_ranks() -> None:
    data = open_files(write([("16x16", 9), ("32x8", 12), ("8x32", 4), ("16x16", 5)]))
    ranks = [steps(data, 30, rank=rank, world=2) for rank in range(2)]
    shapes = [{batch.latent.shape[1:] for rank in ranks for batch in rank[step].batches} for step in range(30)]
    assert all(len(shape) == 1 for shape in shapes)
    assert len(set.union(*shapes)) == 3
    seen = Counter(key for rank in ranks for key in keys(rank))
    assert max(seen.values()) - min(seen.values()) <= 2  # 240 of 30 samples: eight times each, give or take a step
    assert len(seen) == 30


def test_a_mixture_takes_its_sources_by_weight() -> None:
    one, two = (open_files(write(ROWS, prefix=name), name) for name in ("a", "b"))
    read = keys(steps(Mixture([one, two], [3, 1]), 40))
    assert Counter(key[0] for key in read) == {"a": 240, "b": 80}
    for start in range(0, 320, 8):
        assert 1 <= sum(key[0] == "b" for key in read[start : start + 8]) <= 3  # inside every batch
    for name, epoch in (("a", 20), ("b", 20)):
        own = [key for key in read if key[0] == name]
        assert all(len(set(own[i : i + epoch])) == epoch for i in range(0, len(own), epoch))


def test_texts_of_a_mixture_are_padded_alike() -> None:
    one, two = open_files(write(ROWS, prefix="a")), open_files(write(ROWS, prefix="b"))
    two.text_length = 9
    mixture = Mixture([one, two])
    assert mixture.empty_text()[0].shape == (9, 6)
    assert {batch.text.shape[1:] for step in steps(mixture, 4) for batch in step.batches} == {(9, 6)}
