"""Errors inside a run: the same one-line error on every rank, and nothing saved from a broken step."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.read.damage import Damage
from data_pipeline.read.schedule import Start
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import Loaded
from sharpmoe.config import CheckpointConfig, RunConfig
from sharpmoe.errors import DataError, SharpMoEError
from sharpmoe.log_file import read_log, read_log_lines
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks
from sharpmoe.train import loop, monitor, trajectories
from sharpmoe.train.flops import rows_expected, step_flops
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.step import StepResult, train_step
from tests.distributed import run_ranks
from tests.train.setting import ALONE, make_run, plan_for


def error_of(world: World, run: RunConfig, fault: str) -> tuple[str, list[str]]:
    """Train with a fault that only the last rank has; the error and the checkpoints that are there."""
    plan = plan_for(run, world)
    if world.rank == world.size - 1:
        FAULTS[fault](plan)
    try:
        loop.train(plan, world)
    except SharpMoEError as error:
        return f"{type(error).__name__}: {error}", sorted(p.name for p in (plan.folder / "checkpoints").glob("*"))
    return "no error", []


def unreadable_sample(plan: RunPlan) -> None:
    read = plan.data.train.load

    def load(stream, index, draw):  # type: ignore[no-untyped-def]
        if draw.position >= 8:
            return Damage("train-0.tar", "x", "latent.npy: holds NaN or infinity")
        return read(stream, index, draw)

    plan.data.train.load = load  # type: ignore[method-assign]


def overflowing_sample(plan: RunPlan) -> None:
    read = plan.data.train.load

    def load(stream, index, draw):  # type: ignore[no-untyped-def]
        given = read(stream, index, draw)
        return replace(given, latent=given.latent * np.float32(1e30)) if draw.position >= 8 else given

    plan.data.train.load = load  # type: ignore[method-assign]


FAULTS = {"unreadable": unreadable_sample, "overflowing": overflowing_sample}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("unreadable", "DamageError: rank 1: train-0.tar, key x, latent.npy: holds NaN"),
        ("overflowing", "TrainingError: step 2: 1 step(s) in a row skipped, the last because loss flow is not finite"),
    ],
)
def test_a_fault_on_one_rank_ends_all_and_harms_nothing(
    fault: str, expected: str, shards: Path, tmp_path: Path
) -> None:
    run = make_run(shards, tmp_path, checkpoint={"every": 1}, guard={"max_skipped": 1})
    for message, checkpoints in run_ranks(error_of, 2, run, fault):
        assert message.startswith(expected)
        assert "\n" not in message
        assert checkpoints == ["latest", "step00000001"]


def disagree(world: World) -> list[str]:
    answers = []
    for failing in ({0}, {1}, {0, 1}, set()):
        try:
            with raise_on_all_ranks(world):
                if world.rank in failing:
                    raise DataError("shard is missing")
            answers.append("fine")
        except DataError as error:
            answers.append(str(error))
    return answers


def full_disk(world: World) -> list[str]:
    answers = []
    for failing in ({1}, {0, 1}):
        try:
            with raise_on_all_ranks(world):
                if world.rank in failing:
                    raise OSError(28, "No space left on device", "runs/x")
        except SharpMoEError as error:
            answers.append(str(error))
    return answers


@pytest.mark.dist
def test_ranks_agree_on_errors_of_the_system() -> None:
    line = "runs/x: no space left on this disk; free some, or choose another place"
    assert run_ranks(full_disk, 2) == [[f"rank 1: {line}", line]] * 2


@pytest.mark.dist
def test_ranks_agree_on_errors() -> None:
    expected = ["rank 0: shard is missing", "rank 1: shard is missing", "shard is missing", "fine"]
    assert run_ranks(disagree, 2) == [expected, expected]


def drawn_ahead(world: World, run: RunConfig) -> list[bool]:
    """Whether the random numbers of each step were there."""
    there: list[bool] = []
    take = trajectories.DrawnAhead.take

    def noted(self: trajectories.DrawnAhead, keys: list[Any]) -> list[Any]:
        there.append(self._ahead[0] == keys)
        return take(self, keys)

    trajectories.DrawnAhead.take = noted  # type: ignore[method-assign]
    loop.train(plan_for(run, world), world)
    return there


@pytest.mark.dist
def test_numbers_of_the_next_step_are_drawn_meanwhile(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, train={"steps": 3, "global_batch": 8, "micro_batch": 2})
    assert run_ranks(drawn_ahead, 2, run) == [[False, True, True]] * 2


def looked_at(world: World, run: RunConfig) -> list[str]:
    folder = loop.train(plan_for(run, world), world)
    assert folder is not None
    return sorted(str(path.relative_to(run.output)) for path in Path(run.output).rglob("*") if path.is_file())


@pytest.mark.dist
def test_a_whole_run_leaves_its_folder(shards: Path, tmp_path: Path) -> None:
    log = {"validate_every": 1, "sample_every": 1, "allocation": True, "allocation_images": 4, "peak_tflops": 2.0}
    sample = {"captions": ("a red circle", "a blue cross"), "num_steps": 2}
    run = make_run(shards, tmp_path, train={"steps": 1}, log=log, sample=sample)
    names = run_ranks(looked_at, 2, run)[0]
    for name in (
        "run/config.yaml",
        "run/zero.json",
        "run/log.jsonl",
        "run/allocation/before.json",
        "run/allocation/after.json",
        "run/samples/step00000001.png",
        "run/routing/step00000001.png",
        "run/checkpoints/latest",
        "run/checkpoints/step00000001/ema.safetensors",
        "run/checkpoints/step00000001/state_rank00001.safetensors",
    ):
        assert name in names
    assert any(name.startswith("run/tensorboard/events") for name in names)
    figures = read_log(tmp_path / "run" / "log.jsonl")
    booked = step_flops(run, 16, ShardSet.open(shards, "train").text_length, rows_expected(run, 4, 16))
    assert {part: figures[f"flops/per_image/{part}"][1] for part in booked._fields} == booked._asdict()
    per_rank = booked.model * figures["throughput/images_per_second"][1] / 2 / 1e12
    assert figures["throughput/tflops_per_rank"][1] == pytest.approx(per_rank)
    assert figures["throughput/mfu"][1] == figures["throughput/hfu"][1] == pytest.approx(per_rank / 2.0)


@pytest.mark.slow
def test_what_only_draws_or_reports_never_ends_a_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(pixels: object, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(monitor, "save_png", full)
    monkeypatch.setattr(monitor, "allocation_curves", broken)
    log = {"sample_every": 1, "allocation": True, "allocation_images": 4}
    sample = {"captions": ("line one\nline two",), "num_steps": 2}
    run = make_run(shards, tmp_path, train={"steps": 1}, log=log, sample=sample)
    assert launch.start() == ALONE
    try:
        assert loop.train(plan_for(run, ALONE), ALONE) == tmp_path / "run" / "checkpoints" / "step00000001"
    finally:
        launch.stop()
    said = capsys.readouterr().out
    assert said.count("note: the picture of samples could not be written: ") == 2
    assert "samples/step00000001.png: no space left on this disk; free some, or choose another place" in said
    assert "note: the allocation after training could not be written: KeyError: 'x'; training goes on" in said


def test_a_deterministic_run_is_strict_and_says_so(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = []

    def observed(*given: Any, **more: Any) -> StepResult:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return train_step(*given, **more)

    monkeypatch.setattr(loop, "train_step", observed)
    assert launch.start() == ALONE
    try:
        for strict in (True, False):
            run = make_run(shards, tmp_path, name=str(strict), train={"steps": 1, "deterministic": strict})
            loop.train(plan_for(run, ALONE), ALONE)
    finally:
        launch.stop()
    assert modes == [True, False]
    said = capsys.readouterr().out
    assert "repeatable bit for bit on the same devices and versions (train.deterministic)" in said
    assert "repeatable bit for bit on the same kind of host" in said
    started = read_log_lines(tmp_path / "True" / "log.jsonl")[0]
    assert started["settings"]["train.deterministic"] is True


class Device:
    """A clock, and a device that computes on while the host goes on; the host waits for it where it reads from it."""

    def __init__(self) -> None:
        self.now, self.free, self.waits = 0.0, 0.0, 0

    def wait(self, *_: object) -> None:
        self.waits += 1
        self.now = max(self.now, self.free)

    def read_numbers(self, numbers: list[int], world: World) -> list[int]:
        """The exchange between ranks, of which another one waited 0.3 s for its data."""
        self.now = max(self.now, self.free)
        return [*numbers[:2], max(numbers[2], 300_000)]

    def data(self, *_: object) -> Iterator[Any]:
        while True:
            self.now += 0.1
            yield Loaded((), (), Start(0, ()))

    def compute(self, *_: object) -> Any:
        """A step: the host gives the device its work in 1 s, of which the update, 5 s, is left when it returns."""
        self.now = max(self.now, self.free) + 1
        self.free = self.now + 5
        return SimpleNamespace(watch=(), cutoffs=())


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_device_has_left_of_a_step_is_charged_to_that_step(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, logged = Device(), list[tuple[int, float, float]]()
    monkeypatch.setattr("time.monotonic", lambda: device.now)
    monkeypatch.setattr(loop, "wait_for", device.wait)
    monkeypatch.setattr(loop, "_batches", lambda _: device.data())
    monkeypatch.setattr(loop, "train_step", device.compute)
    monkeypatch.setattr(loop, "draw_trajectories", lambda *_: [SimpleNamespace(saliency=torch.zeros(1, 4))])
    monkeypatch.setattr(loop.faults, "DamagedSamples", lambda *_: SimpleNamespace(agree=lambda *_: None))
    monkeypatch.setattr(loop, "_check", lambda *_: None)
    monkeypatch.setattr(loop, "_log_step", lambda _, step, result, tokens, *times: logged.append((step, *times)))
    monkeypatch.setattr(loop, "Progress", lambda *given: SimpleNamespace(watch=(), cutoffs=()))
    monkeypatch.setattr(loop, "Watch", lambda *given: None)
    if ranks > 1:
        monkeypatch.setattr(launch, "_maxima", device.read_numbers)
    run = RunConfig.model_validate({"train": {"steps": 7, "global_batch": 8}, "log": {"every": 3}})
    start = SimpleNamespace(step=0, watch=(), cutoffs=())
    batch, data = SimpleNamespace(global_batch=8), SimpleNamespace(empty_text=None)
    plan = SimpleNamespace(run=run, start=start, batch=batch, data=data)
    session: Any = SimpleNamespace(
        plan=plan,
        world=ALONE._replace(size=ranks),
        log=None,
        engine=None,
        objective=None,
        ema=None,
        callbacks=SimpleNamespace(check=lambda: None),
    )
    for _ in loop._steps(session):
        device.now += 2  # a save or a look, in which the device works on
    waited = 0.1 if ranks == 1 else 0.3
    assert [wait for _, _, wait in logged] == pytest.approx([waited] * 7)
    at = {step: seconds for step, seconds, _ in logged}
    assert [at[step] for step in (1, 3, 6, 7)] == pytest.approx([6.1] * 4)
    assert device.waits == 2 * 4  # of steps that are logged, before and after; none in the others


def test_due_by_steps_and_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    timetable = loop._Timetable(CheckpointConfig(every=10, minutes=2), ALONE)
    answers = []
    for step in range(1, 16):
        now = 30.0 * step
        if timetable.due(step):
            answers.append(step)
    assert answers == [4, 8, 10, 14]
    assert not loop._Timetable(CheckpointConfig(every=0), ALONE).due(10)


def due_by_the_clock_of_rank_0(world: World) -> bool:
    timetable = loop._Timetable(CheckpointConfig(every=0, minutes=1), world)
    timetable._last -= 100.0 if world.is_main else 0.0
    return timetable.due(1)


@pytest.mark.dist
def test_minutes_are_those_of_rank_0() -> None:
    assert run_ranks(due_by_the_clock_of_rank_0, 2) == [True, True]
