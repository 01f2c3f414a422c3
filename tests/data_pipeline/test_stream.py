import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from data_pipeline.schema import Batch
from data_pipeline.shards import ShardSet
from data_pipeline.stream import stream
from sharpmoe.errors import DataError
from tests.fixtures_data import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(make_shards(tmp_path_factory.mktemp("data") / "d"), "train")


def steps(
    shards: ShardSet, count: int, *, rank: int = 0, world: int = 1, micro: int = 2, start: int = 0, workers: int = 0
) -> list[tuple[Batch, ...]]:
    batches = stream(
        shards, seed=3, global_batch=8, micro_batch=micro, rank=rank, world=world, start=start, num_workers=workers
    )
    return list(itertools.islice(batches, count))


def positions(batches: list[tuple[Batch, ...]]) -> list[list[int]]:
    return [[place for batch in step for place in batch.position.tolist()] for step in batches]


def keys(batches: list[tuple[Batch, ...]]) -> list[str]:
    return [key for step in batches for batch in step for key in batch.keys]


def test_one_rank_reads_positions_in_order(shards: ShardSet) -> None:
    read = steps(shards, 5)
    assert [len(step) for step in read] == [4] * 5
    assert positions(read) == [list(range(8 * step, 8 * step + 8)) for step in range(5)]


def test_every_epoch_holds_every_sample_once(shards: ShardSet) -> None:
    read = keys(steps(shards, 10))  # 80 positions, 20 samples
    assert all(Counter(read[start : start + 20]) == Counter(read[:20]) for start in (20, 40, 60))
    assert len(set(read[:20])) == 20
    assert read[:20] != read[20:40]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches_equally(shards: ShardSet, world: int) -> None:
    alone = steps(shards, 6)
    ranks = [steps(shards, 6, rank=rank, world=world) for rank in range(world)]
    for step in range(6):
        assert [len(rank[step]) for rank in ranks] == [4 // world] * world
        together = [batch for rank in ranks for batch in rank[step]]
        for ours, theirs in zip(together, alone[step], strict=True):
            assert ours.keys == theirs.keys
            assert torch.equal(ours.latent, theirs.latent)
            assert torch.equal(ours.position, theirs.position)


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_the_micro_batch_only_cuts(shards: ShardSet, micro: int) -> None:
    assert keys(steps(shards, 6, micro=micro)) == keys(steps(shards, 6))


def test_a_resumed_run_reads_on(shards: ShardSet) -> None:
    assert keys(steps(shards, 7, start=5 * 8)) == keys(steps(shards, 12))[5 * 8 :]
    assert positions(steps(shards, 1, start=40)) == [list(range(40, 48))]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards: ShardSet, workers: int) -> None:
    alone, helped = steps(shards, 6, start=16), steps(shards, 6, start=16, workers=workers)
    for ours, theirs in zip(itertools.chain(*helped), itertools.chain(*alone), strict=True):
        assert isinstance(ours, Batch)
        assert isinstance(ours.keys, tuple)
        assert (ours.keys, ours.captions) == (theirs.keys, theirs.captions)
        assert torch.equal(ours.text, theirs.text)
        assert torch.equal(ours.saliency, theirs.saliency)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_line_from_workers_too(workers: int, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    damaged = ShardSet.open(folder, "train")
    for tar in folder.glob("train-*.tar"):
        tar.write_bytes(b"\xff" * tar.stat().st_size)
    with pytest.raises(DataError, match=r"train-0000\d.tar, key shape-\d+\.\w+.*: checksum differs") as error:
        steps(damaged, 1, workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rank", "world", "micro"), [(0, 1, 3), (0, 3, 1), (2, 2, 2), (-1, 1, 2)])
def test_uneven_shares_are_refused_at_once(shards: ShardSet, rank: int, world: int, micro: int) -> None:
    with pytest.raises(ValueError, match="global batch 8"):
        stream(shards, seed=0, global_batch=8, micro_batch=micro, rank=rank, world=world)
