"""Epochs over http, from a server that is slow, busy and cuts connections: the order and the bytes of a local run."""

import itertools
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.read.schedule import Start
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import Loaded, stream
from data_pipeline.store import remote
from data_pipeline.store.remote import RemoteOptions
from sharpmoe.errors import DamageError, DataError
from tests.data_pipeline.range_server import Request, serving
from tests.memory_shards import write

ROWS = [("16x16", 9), ("16x16", 14), ("16x16", 7), ("16x16", 6)]
SAMPLES, BATCH = 36, 6
SHARD = "train-16x16-00001"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    for name, content in write(ROWS).items():
        (tmp_path / "set" / name).write_bytes(content)
    return tmp_path / "set"


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(cache=tmp_path / "cache", cache_bytes=1 << 20, timeout_s=0.3, retries=6, pause_s=0.01)


def read(shards: ShardSet, steps: int, start: int = 0, workers: int = 0, bad: float = 0) -> list[Loaded]:
    loaded = stream(
        shards, seed=3, global_batch=BATCH, micro_batch=BATCH, rank=0, world=1,
        start=Start(start), num_workers=workers, max_bad_fraction=bad,
    )  # fmt: skip
    return list(itertools.islice(loaded, steps))


def same(one: list[Loaded], other: list[Loaded]) -> bool:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x.batches, y.batches, strict=True)]
    return all(a.keys == b.keys and torch.equal(a.latent, b.latent) and torch.equal(a.text, b.text) for a, b in pairs)


class Moody:
    """Two of three requests go wrong, each time in another way; the same range is answered well in the end.

    By how often a range was asked for, not by the number of all requests: that would depend on how readers take turns.
    """

    moods = ("ok", "503", "cut", "ok", "slow", "429", "ok", "short", "500", "ok", "shifted", "cut")

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.answers: list[str] = []

    def __call__(self, request: Request) -> str:
        what = f"{request.path} {request.headers.get('Range')}"
        self.asked[what] += 1
        self.answers.append(self.moods[(zlib.crc32(what.encode()) + self.asked[what]) % len(self.moods)])
        return self.answers[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_from_a_moody_server(workers: int, folder: Path, options: RemoteOptions) -> None:
    steps = SAMPLES // BATCH + 1
    local = read(ShardSet.open(folder, "train"), steps)
    moody = Moody()
    with serving(folder, moody) as server:
        assert same(read(ShardSet.open(server.url, "train", options), steps, workers=workers), local)
        assert sum(answer not in ("ok", "slow") for answer in moody.answers) > 10
        asked = len(server.seen)
        assert same(read(ShardSet.open(server.url, "train", options), 3, 3 * BATCH, workers), local[3:6])
    assert asked > 20
    files = sum(path.stat().st_size for path in options.cache.iterdir())
    assert files <= options.cache_bytes + 100


@pytest.mark.slow
def test_a_cache_smaller_than_the_shards(folder: Path, options: RemoteOptions) -> None:
    tight = replace(options, cache_bytes=8 << 14)
    local = read(ShardSet.open(folder, "train"), 12)
    with serving(folder) as server:
        assert same(read(ShardSet.open(server.url, "train", tight), 12), local)
    assert sum(path.stat().st_size for path in tight.cache.glob("*.block")) <= tight.cache_bytes
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) > tight.cache_bytes


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [Path.unlink, _flip, lambda path: path.write_bytes(path.read_bytes()[:9000])])
def test_damage_is_that_of_a_local_folder(
    spoil: Callable[[Path], object], folder: Path, options: RemoteOptions
) -> None:
    spoil(folder / f"{SHARD}.tar")
    local = read(ShardSet.open(folder, "train", accept_damage=True), 8, bad=0.9)
    with serving(folder, lambda request: "ok" if _there(folder, request) else "404") as server:
        far = ShardSet.open(server.url, "train", options, accept_damage=True)
        found = read(far, 8, bad=0.9)
        assert same(found, local)
        keys = [{damage.key for step in steps for damage in step.damage} for steps in (local, found)]
        assert keys[0] == keys[1] != set()
        assert all(damage.shard == f"{server.url}/{SHARD}.tar" for step in found for damage in step.damage)
        with pytest.raises(DamageError, match=SHARD):
            read(ShardSet.open(server.url, "train", options), 8)


def _there(folder: Path, request: Request) -> bool:
    return (folder / request.path.lstrip("/")).is_file()


@pytest.mark.slow
def test_a_damaged_cache_is_no_damage(folder: Path, options: RemoteOptions) -> None:
    local = read(ShardSet.open(folder, "train"), 6)
    with serving(folder) as server:
        read(ShardSet.open(server.url, "train", options), 6)
        for block in options.cache.glob("*.block"):
            _flip(block)
        assert same(read(ShardSet.open(server.url, "train", options), 6), local)


def test_a_server_that_stays_away_is_an_error_and_no_damage(folder: Path, options: RemoteOptions) -> None:
    """However much damage a run bears: an outage must not eat samples."""
    down: list[bool] = []
    with serving(folder, lambda _: "503" if down else "ok") as server:
        shards = ShardSet.open(server.url.replace("//", "//ann:hunter2@"), "train", replace(options, retries=2))
        down.append(True)
        with pytest.raises(DataError, match=r"the server answered 503 \(3 tries\)") as raised:
            read(shards, 1, bad=0.99)
    assert not isinstance(raised.value, DamageError)
    assert "hunter2" not in str(raised.value)


def test_resuming_reads_the_index_and_little_else(folder: Path, options: RemoteOptions) -> None:
    with serving(folder) as server:
        read(ShardSet.open(server.url, "train", options), 1, start=2 * BATCH)
        asked = [request.path for request in server.seen]
    assert asked.count("/index.json") == 2  # its size, then its bytes
    assert len([path for path in asked if path.endswith(".tar")]) <= 4 * 5
