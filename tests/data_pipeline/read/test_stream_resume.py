"""Going on: at any cut, on any number of ranks and workers, the samples that follow are those of the run that never
stopped; and it takes no time, however long the index is."""

import itertools
import json
import math
import multiprocessing
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.index import EMPTY_FILE, Shard, index_bytes
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.schedule import Start
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import Loaded, stream
from sharpmoe.parallel.ranks.launch import World
from tests.distributed import run_ranks
from tests.memory_shards import Files, make_index, open_files, sha256, write

SAMPLES, BATCH, STEPS = 50, 12, 9  # 108 samples: two epochs and a bit
ROWS = [("16x16", 13), ("16x16", 20), ("16x16", 9), ("16x16", 8)]
CUTS = [(cut, 1 + i % 4, i // 4 % 4) for i, cut in enumerate(random.Random(7).choices(range(STEPS), k=20))]
Visit = tuple[str, int]


def read(
    data: ShardSet | Mixture, start: Start, steps: int, rank: int = 0, world: int = 1, workers: int = 0
) -> list[Loaded]:
    share = BATCH // world
    micro = share // 2 if share % 2 == 0 else share
    loaded = stream(
        data, seed=3, global_batch=BATCH, micro_batch=micro, rank=rank, world=world, start=start, num_workers=workers
    )
    return list(itertools.islice(loaded, steps))


def visits(step: Loaded) -> list[Visit]:
    """(key, epoch) of a rank's share of one step; of one stream."""
    return [
        (key, place // SAMPLES)
        for batch in step.batches
        for key, place in zip(batch.keys, batch.position.tolist(), strict=True)
    ]


def sequence(ranks: list[list[list[Visit]]]) -> list[Visit]:
    return [visit for step in zip(*ranks, strict=True) for share in step for visit in share]


@pytest.fixture(scope="module")
def shards() -> ShardSet:
    return open_files(write(ROWS))


@pytest.fixture(scope="module")
def whole(shards: ShardSet) -> list[Visit]:
    return sequence([[visits(step) for step in read(shards, Start(), STEPS)]])


def test_the_uninterrupted_run_visits_every_sample_once_per_epoch(whole: list[Visit]) -> None:
    for epoch in (0, 1):
        keys = [key for key, number in whole if number == epoch]
        assert len(keys) == len(set(keys)) == SAMPLES
    first, second = ([key for key, number in whole if number == epoch] for epoch in (0, 1))
    assert first != second


def test_the_cuts_cover_every_layout() -> None:
    assert {(world, workers) for _, world, workers in CUTS} == set(itertools.product(range(1, 5), range(4)))


@pytest.mark.parametrize(("cut", "world", "workers"), CUTS)
@pytest.mark.slow
def test_a_cut_changes_nothing(shards: ShardSet, whole: list[Visit], cut: int, world: int, workers: int) -> None:
    layout = [(rank, world, workers) for rank in range(world)]
    before = sequence([[visits(step) for step in read(shards, Start(), cut, *place)] for place in layout])
    after = [[visits(step) for step in read(shards, Start(cut * BATCH), STEPS - cut, *place)] for place in layout[::-1]]
    assert before + sequence(after[::-1]) == whole


def test_cuts_of_buckets_and_mixtures_change_nothing() -> None:
    one = open_files(write([("16x16", 9), ("32x8", 12), ("24x16", 4)], prefix="a"))
    two = open_files(write([("16x16", 7), ("32x8", 5)], prefix="b"))
    mixture = Mixture([one, two], [2, 1])
    never = read(mixture, Start(), 30)
    start, parts = Start(), list[Loaded]()
    for steps in (7, 1, 9, 13):
        parts += read(mixture, start, steps)
        start = parts[-1].consumed
        assert start.samples == len(parts) * BATCH == sum(start.streams)
    assert [[batch.keys for batch in step.batches] for step in parts] == [
        [batch.keys for batch in step.batches] for step in never
    ]


def test_buckets_of_unequal_token_counts_go_on_under_another_number_of_ranks() -> None:
    shards = open_files(write([("16x16", 30), ("24x16", 20), ("24x16", 4), ("8x32", 6)]))
    never = read(shards, Start(), 20)
    for step in never:
        assert len({batch.latent.shape[1:] for batch in step.batches}) == 1
        assert all(batch.saliency.shape[1] == math.prod(batch.latent.shape[2:]) // 4 for batch in step.batches)
    before = read(shards, Start(), 7)
    after = [read(shards, before[-1].consumed, 13, rank, 3) for rank in range(3)]
    there = [
        [key for part in ranks for batch in part.batches for key in batch.keys] for ranks in zip(*after, strict=True)
    ]
    assert there == [[key for batch in step.batches for key in batch.keys] for step in never[7:]]
    for sizes, stop in zip(shards.bucket_shards.values(), never[-1].consumed.streams, strict=True):
        assert abs(stop - 20 * BATCH * sum(sizes) / 60) <= 2 * BATCH  # in proportion to the samples
    for name, of_bucket in shards.buckets.items():
        keys = [
            key
            for step in never
            for batch in step.batches
            for key in batch.keys
            if batch.latent.shape[1:] == of_bucket.latent
        ]
        counts = Counter(keys[: len(keys) // of_bucket.num_samples * of_bucket.num_samples])
        assert set(counts.values()) == {len(keys) // of_bucket.num_samples}, name  # whole epochs: each sample once


def of_rank(world: World, folder: str, start: int, workers: int) -> list[list[Visit]]:
    shards = ShardSet.open(folder, "train")
    loaded = read(shards, Start(start), STEPS - start // BATCH, world.rank, world.size, workers)
    return [visits(step) for step in loaded]


def of_process(*given: Any) -> list[list[Visit]]:
    """As a launcher starts it: workers are forked; a child of a fork server would start them by another server."""
    multiprocessing.set_start_method("fork", force=True)
    return of_rank(*given)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name, content in write(ROWS).items():
        (tmp_path / name).write_bytes(content)
    return str(tmp_path)


@pytest.mark.dist
def test_ranks_of_a_process_group_agree(whole: list[Visit], folder: str) -> None:
    assert sequence(run_ranks(of_rank, 3, folder, 0, 0)) == whole


@pytest.mark.dist
def test_processes_with_workers_of_their_own_agree(whole: list[Visit], folder: str) -> None:
    """As under a launcher: nothing is shared but the folder; ranks of a test's process group may have no children."""
    context = multiprocessing.get_context("forkserver")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(4)]
        worlds = [World(rank, 4, rank, torch.device("cpu")) for rank in range(4)]
        waiting = [
            pool.submit(of_process, world, folder, 5 * BATCH, 1) for pool, world in zip(pools, worlds, strict=True)
        ]
        ranks = [result.result(timeout=120) for result in waiting]
    assert sequence(ranks) == whole[5 * BATCH :]


NUM_SHARDS, SHARD = 19_532, 512  # ten million samples


class Simulated:
    """Ten million samples in shards that are all alike; counts the tables that are read."""

    def __init__(self) -> None:
        self.location, self.tables = "simulated", 0
        self._files = self._simulate(write([("16x16", SHARD)]))

    def _simulate(self, files: Files) -> Files:
        entry = json.loads(files["index.json"])["shards"][0]
        shards = [Shard(**{**entry, "name": f"train-{number:05d}"}) for number in range(NUM_SHARDS)]
        index = make_index(shards, {EMPTY_FILE: sha256(files[EMPTY_FILE])})
        return {**files, "index.json": index_bytes(index), "tar": files[f"{entry['name']}.tar"]} | {
            "table": files[f"{entry['name']}.json"]
        }

    def _of(self, name: str) -> bytes:
        alike = {"train": name.rpartition(".")[2]}.get(name[:5], name)
        return self._files[{"json": "table"}.get(alike, alike)]

    def read(self, name: str, offset: int, size: int, fresh: bool = False) -> bytes:
        return self._of(name)[offset : offset + size]

    def size(self, name: str) -> int:
        return len(self._of(name))

    def small(self, name: str) -> bytes:
        self.tables += name.startswith("train")
        return self._of(name)


def test_the_first_batch_of_ten_million_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Simulated()
    monkeypatch.setattr("data_pipeline.read.shards.open_store", lambda *_: store)
    calls = 0

    def count(_frame: object, event: str, _given: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    shards = ShardSet.open("simulated", "train")
    batches = stream(shards, seed=1, global_batch=256, micro_batch=64, rank=1, world=4, start=37_654_321)
    keys = Counter(key for batch in next(batches).batches for key in batch.keys)
    sys.setprofile(None)
    batches.close()  # type: ignore[attr-defined]
    assert shards.num_samples == NUM_SHARDS * SHARD > 10_000_000
    assert keys.total() == 64
    assert store.tables <= 8  # those of one or two blocks
    assert calls < 600_000  # of functions, 313,000 today: work per shard, none per sample
