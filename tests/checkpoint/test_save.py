"""Saving beside the training: what is written is the state at the time, and a save that fails costs nothing else."""

import math
import os
import random
import resource
import shutil
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sharpmoe import durable
from sharpmoe.checkpoint import manifest, retention, rng, save
from sharpmoe.checkpoint.manifest import FileEntry, Manifest, Progress, RunIdentity
from sharpmoe.config import CheckpointConfig, RunConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.log_file import LogWriter, read_log, read_log_lines
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from sharpmoe.train.setup import initial_model
from tests.distributed import run_ranks
from tests.train.setting import identical, make_run, plan_for


class Beside(NamedTuple):
    """What happened while a save was held up."""

    pending: bool  # it had not ended when the step after it had
    written: dict[str, torch.Tensor]
    at_begin: dict[str, torch.Tensor]
    after_step: dict[str, torch.Tensor]


def train_during_a_save(world: World, run: RunConfig) -> Beside:
    """Begin a save whose writer waits, change every weight, then let it write."""
    plan = plan_for(run, world)
    session = loop.open_session(plan, world, initial_model(plan))
    go, write = threading.Event(), save.write_state

    def held(*args: Any) -> None:
        assert go.wait(60)
        write(*args)

    save.write_state = held
    before = session.engine.full_weights(session.objective.model, everywhere=True)
    session.checkpoints.begin(Progress(1, 8))
    with torch.no_grad():
        for part in (*session.engine.state.masters(), *session.ema.shards):
            part.add_(1.0)
    after = session.engine.full_weights(session.objective.model, everywhere=True)
    pending = session.checkpoints.take_finished() is None
    go.set()
    outcome = session.checkpoints.wait()
    assert outcome is not None
    assert outcome.error is None
    manifest.verify_checkpoint(outcome.folder)
    return Beside(pending, load_file(outcome.folder / "live.safetensors"), before, after)


@pytest.mark.dist
def test_training_goes_on_while_a_save_is_written_and_does_not_reach_it(shards: Path, tmp_path: Path) -> None:
    for beside in run_ranks(train_during_a_save, 2, make_run(shards, tmp_path)):
        assert beside.pending
        assert identical(beside.written, beside.at_begin)
        assert not identical(beside.written, beside.after_step)


def test_save_does_not_lose_the_outcome_of_an_earlier_save() -> None:
    checkpoints = object.__new__(save.Checkpoints)
    checkpoints._running = Future()
    with pytest.raises(AssertionError, match=r"call wait\(\) first"):
        checkpoints.save(Progress(2, 16))


FULL_AT, STEPS = 3, 5


def train_with_a_full_disk(world: World, run: RunConfig, full: int) -> None:
    """Train; rank `full` cannot write more than 20 kB a file while it saves step 3."""
    write = save.Checkpoints._write

    def limited(saver: save.Checkpoints, taken: Any, draft: Path, final: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == full and taken.progress.step == FULL_AT:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            write(saver, taken, draft, final)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    save.Checkpoints._write = limited  # type: ignore[method-assign]
    loop.train(plan_for(run, world), world)


@pytest.mark.dist
def test_a_full_disk_of_one_rank_costs_one_checkpoint_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    base = make_run(shards, tmp_path, train={"steps": STEPS}, checkpoint={"every": 1, "keep": 9})
    for full, name in ((None, "roomy"), (0, "full0"), (1, "full1")):
        run_ranks(train_with_a_full_disk, 2, base.model_copy(update={"name": name}), full)
    losses = read_log(tmp_path / "roomy" / "log.jsonl")["loss/total"]
    assert list(losses) == list(range(1, STEPS + 1))
    for full in (0, 1):
        folder = tmp_path / f"full{full}"
        saved = [step for step in range(1, STEPS + 1) if step != FULL_AT]
        names = sorted(os.listdir(folder / "checkpoints"))
        assert names == ["latest", *(retention.folder_name(step) for step in saved)]
        for step in saved:
            manifest.verify_checkpoint(folder / "checkpoints" / retention.folder_name(step))
        (failed,) = [event for event in read_log_lines(folder / "log.jsonl") if event.get("event") == "save failed"]
        assert failed["step"] == FULL_AT
        assert failed["error"].startswith(f"rank {full}: ")
        assert "cannot be written (" in failed["error"]
        assert read_log(folder / "log.jsonl")["loss/total"] == losses


def test_a_disk_without_room_is_seen_before_anything_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CheckpointError, match=r"a checkpoint takes 0.00102 GB, 1e-05 GB are free; free space, lower"):
        retention.check_room(tmp_path / "checkpoints", 1, 1_000_000)
    with pytest.raises(
        CheckpointError, match=r"a checkpoint takes 9.18e-06 GB, 1e-05 GB are free, and 2 are still to come; free"
    ):
        retention.check_room(tmp_path / "checkpoints", 2, 9_000)
    retention.check_room(tmp_path / "checkpoints", 1, 9_000)


def pretend(root: Path, step: int, saved: float = 0.0) -> Path:
    """A checkpoint of one file, published as a save does."""
    final = root / retention.folder_name(step)
    draft = root / f".{final.name}.partial"
    durable.fresh_folder(draft)
    (draft / "live.safetensors").write_text(str(step))
    files = {"live.safetensors": manifest.file_entry(draft / "live.safetensors")}
    manifest.write_manifest(
        Manifest(
            folder=draft,
            progress=Progress(step, step),
            identity=RunIdentity("fp32", "adamw", 0, ""),
            model=RunConfig().model,
            settings={},
            files=files,
            saved=saved,
        )
    )
    durable.publish_folder(draft, final)
    durable.write_atomically(root / "latest", final.name)
    return final


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 1}, [9]),
        ({"keep": 3}, [7, 8, 9]),
        ({"keep": 2, "keep_every": 4}, [4, 8, 9]),
        ({"keep": 1, "keep_every": 2}, [2, 4, 6, 8, 9]),
    ],
)
def test_the_last_ones_and_the_milestones_stay(config: dict[str, int], kept: list[int], tmp_path: Path) -> None:
    (tmp_path / "step00000000").mkdir()  # somebody's: it has no manifest
    for step in range(1, 10):
        (tmp_path / f".step{step:08d}.partial").mkdir()
        final = pretend(tmp_path, step)
        retention.drop_old(tmp_path, final, CheckpointConfig(**config))
    names = [retention.folder_name(step) for step in kept]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step00000000", *names]


def test_the_best_stays_beside_them_and_is_named(tmp_path: Path) -> None:
    root, losses = tmp_path / "checkpoints", {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.6}
    root.mkdir()
    for step, loss in losses.items():
        if step != 5:  # measured and not saved
            LogWriter(tmp_path, "a").figures(step, {"validation/flow": loss})
            retention.drop_old(root, pretend(root, step), CheckpointConfig(keep=1, keep_best=True))
    LogWriter(tmp_path, "a").figures(5, {"validation/flow": losses[5]})
    assert sorted(os.listdir(root)) == ["best", "latest", "step00000002", "step00000006"]
    assert (root / "best").read_text() == "step00000002"
    LogWriter(tmp_path, "b").event(2, "start", {})  # a run that goes on from there, and is better
    LogWriter(tmp_path, "b").figures(3, {"validation/flow": 0.1})
    retention.drop_old(root, pretend(root, 3), CheckpointConfig(keep=1, keep_best=True))
    assert (root / "best").read_text() == "step00000003"
    assert sorted(os.listdir(root)) == ["best", "latest", "step00000003"]


def test_the_best_survives_a_lost_log_and_is_no_checkpoint_without_a_number(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    for step, loss in ((1, 0.2), (2, math.nan), (3, 0.4)):
        LogWriter(tmp_path, "a").figures(step, {"validation/flow": loss})
        retention.drop_old(root, pretend(root, step), CheckpointConfig(keep=1, keep_best=True))
    (tmp_path / "log.jsonl").unlink()
    retention.drop_old(root, pretend(root, 4), CheckpointConfig(keep=1, keep_best=True))
    assert sorted(os.listdir(root)) == ["best", "latest", "step00000001", "step00000004"]
    assert retention.kept_best(root) == root / "step00000001"
    retention.drop_old(root, pretend(root, 5), CheckpointConfig(keep=1))
    assert sorted(os.listdir(root)) == ["latest", "step00000005"]


def test_nothing_measured_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        retention.drop_old(tmp_path, pretend(tmp_path, step), CheckpointConfig(keep=1, keep_best=True))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step00000002"]


def test_what_was_written_last_counts_not_the_highest_step(tmp_path: Path) -> None:
    for number, step in enumerate((5, 6, 2, 3)):  # a run that went on from an older checkpoint
        os.utime(pretend(tmp_path, step, 1e9 + number) / "manifest.json", ns=(9 - number, 9 - number))  # as copied
    names = ["step00000003", "step00000002", "step00000006", "step00000005"]
    assert [path.name for path in retention.newest_first(tmp_path)] == names
    assert manifest.read_manifest(tmp_path / "step00000003").saved == 1e9 + 3
    (tmp_path / "latest").unlink()
    assert [path.name for path in retention.newest_first(tmp_path)] == names
    retention.drop_old(tmp_path, tmp_path / "step00000003", CheckpointConfig(keep=2))
    assert sorted(os.listdir(tmp_path)) == ["step00000002", "step00000003"]


def test_checkpoints_that_do_not_tell_their_time_are_ordered_by_step(tmp_path: Path) -> None:
    for number, step in enumerate((9, 10, 8)):
        os.utime(pretend(tmp_path, step) / "manifest.json", ns=(number, number))
    (tmp_path / "latest").unlink()
    pretend(tmp_path, 11, 1e9)
    (tmp_path / "latest").unlink()
    (pretend(tmp_path, 12) / "manifest.json").write_text("damaged")
    (tmp_path / "latest").unlink()
    (tmp_path / "step00000013").mkdir()  # not by a save
    steps = [retention._step_of(path) for path in retention.newest_first(tmp_path)]
    assert steps == [12, 11, 10, 9, 8, 13]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_checkpoint_written_twice_is_the_second(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    pretend(tmp_path, 1)
    (tmp_path / "step00000001" / "of the first").touch()
    final = pretend(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step00000001"]
    assert not (final / "of the first").exists()
    manifest.verify_checkpoint(final)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    final = pretend(tmp_path, 3)
    found = manifest.read_manifest(final)
    assert found.files == {"live.safetensors": FileEntry(1, manifest.file_entry(final / "live.safetensors").sha256)}
    assert (found.folder, found.progress, found.model) == (final, Progress(3, 3), RunConfig().model)
    manifest.write_manifest(replace(found, folder=tmp_path))
    assert (tmp_path / "manifest.json").read_bytes() == (final / "manifest.json").read_bytes()


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest.json: missing; name an undamaged checkpoint"):
        manifest.read_manifest(tmp_path)
    final = pretend(tmp_path, 1)
    text = (final / "manifest.json").read_text().replace('"schema": 2', '"schema": 99')
    for content, words in ((text, "schema 99, expected 2"), ("{}", "not understood"), ("{", "not understood")):
        (final / "manifest.json").write_text(content)
        (final / "manifest.sha256").write_text(manifest._seal(content.encode()))
        with pytest.raises(CheckpointError, match=words):
            manifest.read_manifest(final)


def test_files_are_dealt_out_evenly_and_completely(tmp_path: Path) -> None:
    files = {f"file{size}": FileEntry(size, "") for size in (90, 50, 40, 10, 0, 0)}
    found = replace(manifest.read_manifest(pretend(tmp_path, 1)), files=files)
    dealt = manifest.split_files(found, 3)
    assert sorted(name for part in dealt for name in part) == sorted(files)
    assert max(sum(files[name].size for name in part) for part in dealt) == 90
    assert manifest.split_files(found, 3) == dealt


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    draw()
    rng.write_generators(tmp_path / "rng.json", rng.generator_states())
    first = draw()
    assert draw() != first
    rng.restore_generators(tmp_path / "rng.json")
    assert draw() == first
