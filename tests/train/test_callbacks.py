"""Callbacks of the training loop: what they get, that they change no number, and that an error ends a saved run."""

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sharpmoe import TrainingCallback, TrainingEnd, TrainingLook, TrainingSave, TrainingStep
from sharpmoe.checkpoint.rng import generator_states
from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError, SharpMoEError
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks import launch, signals
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from sharpmoe.train.callbacks import CallbackCalls, CallbackError, check_callbacks, open_callbacks
from tests.distributed import run_ranks
from tests.train.setting import ALONE, identical, make_run, plan_for


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    assert launch.start() == ALONE
    yield
    launch.stop()


class Watching(TrainingCallback):
    """Keeps the record of every call."""

    def __init__(self) -> None:
        self.steps: list[TrainingStep] = []
        self.looks: list[TrainingLook] = []
        self.saves: list[TrainingSave] = []
        self.ends: list[TrainingEnd] = []
        self.threads: set[str] = set()

    def on_step(self, step: TrainingStep) -> None:
        self.threads.add(threading.current_thread().name)
        self.steps.append(step)

    def on_look(self, look: TrainingLook) -> None:
        self.looks.append(look)

    def on_save(self, save: TrainingSave) -> None:
        assert (save.checkpoint / "ema.safetensors").is_file()
        self.saves.append(save)

    def on_end(self, end: TrainingEnd) -> None:
        self.ends.append(end)


class Meddling(Watching):
    """Also draws from every generator, seeds them anew, and tries to change what it gets."""

    def _meddle(self, given: Any) -> None:
        random.seed(5)
        np.random.seed(7)
        torch.manual_seed(torch.randint(9, ()).item())
        torch.set_grad_enabled(True)
        with pytest.raises(TypeError):
            given["loss/total"] = 0.0

    def on_step(self, step: TrainingStep) -> None:
        super().on_step(step)
        self._meddle(step.figures)

    def on_look(self, look: TrainingLook) -> None:
        super().on_look(look)
        self._meddle(look.figures)
        if look.pixels is not None:
            with pytest.raises(ValueError, match="read-only"):
                look.pixels[:] = 0


def failing(method: str, step: int, error: BaseException) -> TrainingCallback:
    """A callback with one method, which fails at a step."""

    def fail(self: object, record: Any) -> None:
        if record.step == step:
            raise error

    return type("Failing", (), {method: fail})()  # type: ignore[no-any-return]


def small_run(shards: Path, folder: Path, **sections: Any) -> RunConfig:
    return make_run(shards, folder, **{"train": {"steps": 3}, "rollout": {"num_steps": 2}} | sections)


def check_calls(seen: Watching, folder: Path, checkpoint: Path) -> None:
    """Compare what a run of two steps told with its log and its files."""
    logged = read_log(folder / "log.jsonl")
    assert [(each.step, each.steps, each.images, each.is_logged) for each in seen.steps] == [
        (1, 2, 8, True),
        (2, 2, 8, True),
    ]
    assert seen.threads == {threading.main_thread().name}
    for step in seen.steps:
        assert step.lr == step.figures["optim/lr"] == 0.01
        for tag in ("loss/total", "optim/grad_norm", "routing_entropy/layer0"):
            assert step.figures[tag] == logged[tag][step.step]
    expected = {"allocation": [0, 2], "validation": [1, 2], "samples": [0, 2], "routing": [0, 2]}
    for kind, steps in expected.items():
        assert [each.step for each in seen.looks if each.kind == kind] == steps
    for look in seen.looks:
        if look.kind == "validation":
            assert look.figures["validation/flow"] == logged["validation/flow"][look.step]
        elif look.kind in ("samples", "routing"):
            assert look.pixels is not None
            assert look.path is not None
            assert look.path.is_file()
    assert seen.saves == [TrainingSave(step=2, checkpoint=checkpoint)]
    assert seen.ends == [TrainingEnd(step=2, why="finished", message="", checkpoint=checkpoint)]


@pytest.mark.slow
def test_a_callback_is_told_everything_and_changes_nothing(shards: Path, tmp_path: Path) -> None:
    seen = Meddling()
    states, weights, curves = [], [], []
    for name, callbacks in (("without", []), ("with", [seen])):
        run = small_run(
            shards,
            tmp_path,
            name=name,
            train={"steps": 2},
            log={"validate_every": 2, "sample_every": 2, "allocation": True, "allocation_images": 2},
            sample={"captions": ("a red circle",), "num_steps": 1},
        )
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        folder = loop.train(plan_for(run, ALONE), ALONE, callbacks)
        states.append(generator_states())
        weights.append({kind: load_file(folder / f"{kind}.safetensors") for kind in ("ema", "live")})
        found = read_log(tmp_path / name / "log.jsonl")
        curves.append({tag: found[tag] for tag in found if not tag.startswith(("throughput", "memory"))})
    assert states[0] == states[1]
    assert curves[0] == curves[1]
    assert all(identical(weights[0][kind], weights[1][kind]) for kind in weights[0])
    check_calls(seen, tmp_path / "with", folder)


@pytest.mark.parametrize(
    ("method", "step", "error", "saved", "said"),
    [
        (
            "on_step",
            2,
            ZeroDivisionError("no reason\nmore"),
            2,
            "on_step after step 2 raised ZeroDivisionError: no",
        ),
        ("on_step", 3, SystemExit(1), 3, "on_step after step 3 raised SystemExit: 1"),
        ("on_look", 0, ValueError(), 0, "on_look after step 0 raised ValueError;"),
        ("on_save", 2, OSError(28, "full"), 3, "on_save after step 2 raised OSError"),
        ("on_end", 3, KeyError("x"), 3, "on_end after step 3 raised KeyError: 'x'"),
    ],
)
def test_an_error_ends_the_run_in_one_line_after_a_save(
    method: str, step: int, error: BaseException, saved: int, said: str, shards: Path, tmp_path: Path
) -> None:
    log = {"allocation": method == "on_look", "allocation_images": 1}
    run = small_run(shards, tmp_path, log=log, checkpoint={"every": 2 * (method == "on_save"), "asynchronous": False})
    other = Watching()
    with pytest.raises(CallbackError) as caught:
        loop.train(plan_for(run, ALONE), ALONE, [failing(method, step, error), other])
    told = str(caught.value)
    assert told.startswith("callback 1 (tests.train.test_callbacks:Failing): ")
    assert said in told
    assert "\n" not in told
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert latest.strip() == f"step{saved:08}"
    assert len(other.ends) == 1
    assert other.ends[0].why == ("failed" if step < 3 and method != "on_save" else "finished")
    assert other.ends[0].checkpoint == tmp_path / "run" / "checkpoints" / f"step{saved:08}"


def one_rank_fails(world: World, run: RunConfig) -> tuple[str, int]:
    seen = Watching()
    try:
        loop.train(plan_for(run, world), world, [failing("on_step", 2, ValueError("no")), seen])
    except SharpMoEError as error:
        return f"{type(error).__name__}: {error}", len(seen.steps)
    return "no error", 0


@pytest.mark.dist
def test_every_rank_ends_alike_and_only_the_first_calls(shards: Path, tmp_path: Path) -> None:
    found = run_ranks(one_rank_fails, 2, small_run(shards, tmp_path))
    assert len({told for told, _ in found}) == 1
    assert found[0][0].startswith("CallbackError: rank 0: callback 1 (")
    assert [steps for _, steps in found] == [2, 0]
    assert (tmp_path / "run" / "checkpoints" / "step00000002" / "ema.safetensors").is_file()


def test_a_run_that_a_callback_ended_goes_on_as_if_it_had_not(shards: Path, tmp_path: Path) -> None:
    whole = loop.train(plan_for(small_run(shards, tmp_path, name="whole"), ALONE), ALONE)
    run = small_run(shards, tmp_path, checkpoint={"resume": "auto"})
    with pytest.raises(CallbackError):
        loop.train(plan_for(run, ALONE), ALONE, [failing("on_step", 1, ValueError("no"))])
    again = loop.train(plan_for(run, ALONE), ALONE)
    for kind in ("ema", "live"):
        assert identical(load_file(whole / f"{kind}.safetensors"), load_file(again / f"{kind}.safetensors"))


def test_a_signal_that_a_callback_raises_stops_the_run(shards: Path, tmp_path: Path) -> None:
    class Stopping(Watching):
        def on_step(self, step: TrainingStep) -> None:
            if step.step == 2:
                signal.raise_signal(signal.SIGTERM)
                while not signals.asked():  # a thread reads it, on a busy machine not at once
                    time.sleep(0.01)

    seen = Stopping()
    with signals.listening():
        folder = loop.train(plan_for(small_run(shards, tmp_path), ALONE), ALONE, [seen])
    assert seen.ends == [TrainingEnd(step=2, why="stopped", message="SIGTERM", checkpoint=folder)]


def test_a_run_that_fails_tells_its_error(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(*_: Any) -> None:
        raise SharpMoEError("no numbers")

    monkeypatch.setattr(loop, "train_step", train_step)
    seen = Watching()
    with pytest.raises(SharpMoEError, match="no numbers"):
        loop.train(plan_for(small_run(shards, tmp_path), ALONE), ALONE, [seen])
    assert seen.ends == [TrainingEnd(step=0, why="failed", message="no numbers", checkpoint=None)]


MODULE = """
steps = []
class Own:
    def on_step(self, step):
        steps.append(step.step)
class Needy:
    def __init__(self, x): ...
    def on_end(self, end): ...
class Wrong:
    def on_stp(self, step): ...
class Empty: ...
own = Own()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    (tmp_path / "own_callbacks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own_callbacks", raising=False)
    return lambda: sys.modules["own_callbacks"]


def test_a_run_file_names_callbacks_of_the_working_folder(
    module: Callable[[], Any], shards: Path, tmp_path: Path
) -> None:
    run = small_run(shards, tmp_path, log={"callbacks": ("own_callbacks:Own", "own_callbacks:own")})
    loop.train(plan_for(run, ALONE), ALONE)
    assert module().steps == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("own_callbacks", "'own_callbacks': expected PACKAGE.MODULE:NAME"),
        ("no_such_module:X", "no_such_module cannot be imported (ModuleNotFoundError: No module named"),
        ("own_callbacks:Missing", "own_callbacks has no Missing; expected"),
        ("own_callbacks:Wrong", "method on_stp is never called; expected some of on_step, on_look, on_save, on_end"),
        ("own_callbacks:Empty", "has no method that is called"),
        ("own_callbacks:Needy", "own_callbacks:Needy() failed (TypeError: "),
    ],
)
def test_a_wrong_reference_is_one_line(module: Callable[[], Any], reference: str, said: str) -> None:
    for find in (open_callbacks,) if "()" in said else (check_callbacks, open_callbacks):
        with pytest.raises(ConfigError) as caught:
            find([reference])
        assert str(caught.value).startswith("log.callbacks: ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_there_need_be_no_callback() -> None:
    assert not CallbackCalls({})
    with pytest.raises(ConfigError, match="callback 1 \\(builtins:object\\): has no method that is called"):
        open_callbacks([], [object()])


def test_a_run_writes_its_report_and_one_that_fails_is_a_note(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folders: object) -> None:
        raise KeyError("x")

    for name in ("well", "broken"):
        if name == "broken":
            monkeypatch.setattr(loop, "write_report", broken)
        run = small_run(shards, tmp_path, name=name, train={"steps": 1}, log={"report": True, "validate_every": 1})
        loop.train(plan_for(run, ALONE), ALONE)
    assert (tmp_path / "well" / "report.html").is_file()
    said = capsys.readouterr().out
    assert f"  report     {tmp_path}/well/report.html" in said
    assert "note: the report could not be written: KeyError: 'x'; the run is complete" in said
    assert "done: " in said[said.index("note: the report") :]
