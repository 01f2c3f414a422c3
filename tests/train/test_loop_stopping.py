"""A signal on one rank, wherever it finds the run: a sound checkpoint, word left behind, the same numbers."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from sharpmoe.checkpoint import manifest, save
from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log, read_log_lines
from sharpmoe.parallel.ranks import signals, watchdog
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.train import loop, monitor
from tests.distributed import run_ranks, start_ranks
from tests.train.setting import identical, make_run, plan_for


class Place(NamedTuple):
    """A function that a run calls, whose call number `call` meets the signal."""

    module: Any
    name: str
    call: int
    step: int  # that is then saved
    looked: bool = True


# The others do without: pictures and tables take most of the time.
DRAWN, MEASURED = ("sampling", "routing sheet"), ("first look", "last look")
# Three steps, validated and saved after each.
PLACES = {
    "data": Place(loop, "draw_trajectories", 2, 1),
    "step": Place(loop, "train_step", 2, 2, looked=False),  # before the validation that follows
    "save": Place(save, "_write_own", 1, 1),
    "last save": Place(loop, "ensure_saved", 1, 3),
    "first look": Place(monitor, "measure_allocation", 1, 0, looked=False),
    "validation": Place(monitor, "validate", 4, 2, looked=False),  # of the live weights first
    "sampling": Place(monitor, "draw_images", 2, 1, looked=False),
    "routing sheet": Place(monitor, "observe_routing", 3, 2, looked=False),
    "last look": Place(monitor, "measure_allocation", 2, 3, looked=False),
}


class Seen(NamedTuple):
    stopped: dict[str, Any] | None  # stopped.json after the signal
    latest: str
    seconds: float  # from the signal to the end
    left: bool  # whether stopped.json is there after the second start


@contextmanager
def signal_at(place: Place, sent: list[float], number: int = signal.SIGTERM) -> Iterator[None]:
    """Have call number `place.call` of a function find this rank asked to stop."""
    original: Callable[..., Any] = getattr(place.module, place.name)
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == place.call:
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)
            while not signals.asked():
                time.sleep(0.001)
        return original(*args, **kwargs)

    setattr(place.module, place.name, called)
    try:
        yield
    finally:
        setattr(place.module, place.name, original)


def interrupted(world: World, run: RunConfig, place: Place) -> Seen:
    sent: list[float] = []
    folder = Path(run.output) / run.name
    with signals.listening(), signal_at(place, sent) if world.rank == 1 else nullcontext():
        loop.train(plan_for(run, world), world)
    took = time.monotonic() - sent[0] if sent else 0.0
    gather_objects(None, world)  # rank 0 writes
    file = folder / loop._STOPPED_FILE
    stopped = json.loads(file.read_text()) if file.exists() else None
    latest = (folder / "checkpoints" / "latest").read_text()
    manifest.verify_checkpoint(folder / "checkpoints" / latest)
    with signals.listening():
        loop.train(plan_for(run, world), world)
    gather_objects(None, world)
    return Seen(stopped, latest, took, file.exists())


def all_of_them(world: World, run: RunConfig, output: Path) -> dict[str, Seen]:
    loop.train(plan_for(run, world), world)
    seen = {}
    for name, place in PLACES.items():
        log = run.log.model_copy(update={"sample_every": int(name in DRAWN), "allocation": name in MEASURED})
        seen[name] = interrupted(world, run.model_copy(update={"output": str(output / name), "log": log}), place)
    return seen


def outcome(run: Path) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """Losses and held-out figures, and the weights at the end."""
    figures = {
        tag: curve
        for tag, curve in read_log(run / "log.jsonl").items()
        if tag.startswith(("loss/", "validation/")) or tag == "optim/grad_norm"
    }
    weights = load_file(run / "checkpoints" / "step00000003" / "live.safetensors")
    return figures, weights | load_file(run / "checkpoints" / "step00000003" / "ema.safetensors")


@pytest.mark.dist
@pytest.mark.sweep
@pytest.mark.timeout(420)
def test_a_signal_anywhere_costs_nothing(shards: Path, tmp_path: Path) -> None:
    log = {"validate_every": 1, "allocation_images": 4}
    sample = {"captions": ("a red circle", "a blue cross"), "num_steps": 2}
    checkpoint = {"every": 1, "resume": "auto", "asynchronous": False}
    run = make_run(
        shards, tmp_path, stage="pretrain", train={"steps": 3}, log=log, sample=sample, checkpoint=checkpoint
    )
    seen = run_ranks(all_of_them, 2, run, tmp_path, timeout=400)
    figures, weights = outcome(tmp_path / "run")
    assert set(figures["loss/total"]) == set(figures["validation/flow"]) == {1, 2, 3}
    for name, place in PLACES.items():
        of_signalled: Seen = seen[1][name]
        if name == "last save":
            assert of_signalled.stopped is None  # it was finished nevertheless
        else:
            assert of_signalled.stopped == {"signal": "SIGTERM", "step": place.step, "looked": place.looked}, name
        assert of_signalled.latest == f"step{place.step:08}", name
        assert of_signalled.seconds < 10, name
        assert not of_signalled.left
        again, same = outcome(tmp_path / name / "run")
        assert again == figures, name
        assert identical(same, weights), name


def pressed(world: World, run: RunConfig) -> tuple[str, int]:
    """How a run ends that Ctrl-C meets on one rank in its second step; the step that the next start goes on from."""
    how, place = "returned", Place(loop, "train_step", 2, 2)
    with signals.listening(), signal_at(place, [], signal.SIGINT) if world.rank == 1 else nullcontext():
        try:
            loop.train(plan_for(run, world), world)
        except KeyboardInterrupt:
            how = "interrupted"
    gather_objects(None, world)  # rank 0 writes
    saved = plan_for(run, world).start.step
    with signals.listening():
        loop.train(plan_for(run, world), world)
    return how, saved


@pytest.mark.dist
def test_ctrl_c_saves_and_interrupts_every_rank(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, stage="pretrain", train={"steps": 3}, checkpoint={"resume": "auto"})
    assert run_ranks(pressed, 2, run) == [("interrupted", 2)] * 2
    (event,) = [line for line in read_log_lines(tmp_path / "run" / "log.jsonl") if line.get("event") == "stop"]
    assert (event["signal"], event["step"]) == ("SIGINT", 2)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step00000003"


KILLED: dict[str, tuple[Any, str]] = {"step": (loop, "train_step"), "save": (save, "_write_own")}


def killed_at(world: World, run: RunConfig, place: str) -> None:
    """Train; rank 1 is killed at a place. What the ranks say goes to a file each."""
    file = os.open(Path(run.output) / f"err{world.rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    if world.rank == 1:
        setattr(*KILLED[place], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    loop.train(plan_for(run, world), world)


@pytest.mark.dist
@pytest.mark.parametrize("place", KILLED)
def test_a_killed_rank_is_named(place: str, shards: Path, tmp_path: Path) -> None:
    sections = {"peers": {"dead_after": 5}, "model": {"depth": 2}, "train": {"steps": 2}, "checkpoint": {"every": 1}}
    run = make_run(shards, tmp_path, stage="pretrain", **sections)
    with start_ranks(killed_at, 2, run, place) as ranks:
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [watchdog.LOST, -signal.SIGKILL]
    (line,) = [line for line in (tmp_path / "err0").read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 0: rank 1 \(.*, last seen in (the start|step \d)\): no heartbeat for 5 s", line), line
