"""Preparing in processes of their own that are killed, with SIGKILL, at any moment."""

import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

import data_pipeline.prepare.ranks as ranks
import data_pipeline.prepare.write as write
from data_pipeline.encode.build import codec_bytes
from data_pipeline.prepare.finish import WORK_FOLDER
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.write import Machine, prepare_shards
from data_pipeline.read.shards import ShardSet
from sharpmoe.errors import DataError
from tests.distributed import CONTEXT
from tests.fixtures_data import ShapesSource, make_shards, shapes_recipe

_PICTURES = 240
_SIDES = ((1.0, 1.0), (1.0, 3.0))
_KILLS = 10
_DEADLINE_S = 120


def recipe_of_many_shards() -> tuple[ShapesSource, object]:
    return ShapesSource(_PICTURES, 32, (7,), 1, _SIDES), replace(shapes_recipe(shard_samples=4), buckets="32x32,16x64")


def work(folder: Path, rank: int, size: int) -> None:
    source, recipe = recipe_of_many_shards()
    done = prepare_shards(source, folder, recipe, Machine(progress=False, place=Rank(rank, size)))
    os._exit(0 if done.complete else 10)


def start(folder: Path, size: int) -> list[BaseProcess]:
    processes: list[BaseProcess] = [CONTEXT.Process(target=work, args=(folder, rank, size)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def finished(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(_DEADLINE_S)
    return [process.exitcode for process in processes]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")} if folder.is_dir() else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing interrupts writes."""
    folder = tmp_path_factory.mktemp("whole")
    source, recipe = recipe_of_many_shards()
    prepare_shards(source, folder, recipe, Machine(progress=False))
    assert ShardSet.open(folder, "train").num_samples + ShardSet.open(folder, "unseen").num_samples == _PICTURES - 1
    return contents(folder)


@pytest.mark.sweep
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_ten_moments_the_result_is_that_of_an_uninterrupted_run(
    size: int, whole: dict[str, bytes], tmp_path: Path
) -> None:
    generator = np.random.Generator(np.random.Philox(key=size))
    kills = 0
    while kills < _KILLS:
        before = len(files(tmp_path))
        more = int(generator.integers(0, 2 * len(whole) // _KILLS))  # files that appear before the kill
        processes = start(tmp_path, size)
        since = time.monotonic()
        while len(files(tmp_path)) < before + more and all(process.is_alive() for process in processes):
            assert time.monotonic() - since < _DEADLINE_S
            time.sleep(0.001)
        time.sleep(float(generator.uniform(0, 0.02)))  # anywhere within the work on a file
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        codes = finished(processes)
        if "index.json" in files(tmp_path):  # this run came to its end: the next one starts from nothing
            assert files(tmp_path) >= whole.keys()
            for path in (tmp_path / "index.json", *tmp_path.glob("*.tar")):
                path.unlink()
            continue
        assert set(codes) <= {-signal.SIGKILL, 10}  # 10: it had left the rest to the others a moment before
        kills += -signal.SIGKILL in codes
    codes = finished(start(tmp_path, size))
    assert codes.count(0) >= 1
    assert set(codes) <= {0, 10}
    assert contents(tmp_path) == whole


def test_what_a_kill_right_after_the_index_leaves_is_cleared_away(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    before = contents(folder)
    (folder / WORK_FOLDER / "0123").mkdir(parents=True)
    (folder / WORK_FOLDER / "0123" / "unit.jsonl").write_text("{}\n")
    make_shards(folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_ranks_share_the_work_and_the_last_one_writes_the_index(whole: dict[str, bytes], tmp_path: Path) -> None:
    codes = finished(start(tmp_path, 3))
    assert codes.count(0) >= 1
    assert set(codes) <= {0, 10}
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_a_rank_that_never_comes_costs_its_shards_alone(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(ranks, "_POLL_S", 0.01)
    source, recipe = recipe_of_many_shards()
    with pytest.raises(DataError, match="rank 0, which fits the codec for all 2 ranks, gives no sign of life; run the"):
        prepare_shards(source, tmp_path, recipe, Machine(progress=False, place=Rank(1, 2)))
    assert not files(tmp_path) & {"codec.safetensors", "recipe.json"}
    fitted = next((tmp_path / WORK_FOLDER).iterdir()) / "codec.safetensors"
    assert not fitted.exists()
    fitted.write_bytes(whole["codec.safetensors"])  # rank 0 has died after the fit
    second = prepare_shards(source, tmp_path, recipe, Machine(progress=False, place=Rank(1, 2)))
    assert not second.complete
    written = {name for name in files(tmp_path) if name.endswith(".tar")}
    shards = {name for name in whole if name.endswith(".tar")}
    assert 0.3 < len(written) / len(shards) < 0.7
    alone = prepare_shards(source, tmp_path, recipe, Machine(progress=False))  # without the other rank
    assert alone.complete
    assert contents(tmp_path) == whole


def test_a_slow_fit_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(ranks, "_POLL_S", 0.01)
    monkeypatch.setattr(ranks, "_BEAT_S", 0.02)
    content = (make_shards(tmp_path / "other") / "codec.safetensors").read_bytes()
    monkeypatch.setattr(write, "new_codec", None)  # it is not for this rank to fit one
    work = tmp_path / "d" / WORK_FOLDER / "0123"
    second = Machine(progress=False, place=Rank(1, 2))
    with ranks.heartbeat(work, Rank(0, 2)):
        threading.Timer(1.0, (work / "codec.safetensors").write_bytes, [content]).start()
        codec = write._codec(tmp_path / "d", work, shapes_recipe(), second, lambda: iter(()))
    assert codec_bytes(codec) == content


def test_a_given_codec_is_waited_for_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "wait", None)
    content = (make_shards(tmp_path / "other") / "codec.safetensors").read_bytes()
    (tmp_path / "work").mkdir()
    recipe = replace(shapes_recipe(), given_codec=content)
    second = Machine(progress=False, place=Rank(1, 2))
    codec = write._codec(tmp_path / "d", tmp_path / "work", recipe, second, lambda: iter(()))
    assert codec_bytes(codec) == content


def test_every_rank_of_a_second_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "d")
    before = contents(folder)
    monkeypatch.setattr(ShapesSource, "survey", None)
    for rank in range(2):
        done = prepare_shards(ShapesSource(), folder, shapes_recipe(), Machine(progress=False, place=Rank(rank, 2)))
        assert not done.worked
        assert done.complete
    assert contents(folder) == before
