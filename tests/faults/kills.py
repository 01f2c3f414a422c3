"""Kill ranks of a run at random, most of them inside a save, restart it, and compare with a run that nobody killed.

The suite does this a few times. All of it: `python -m tests.faults.kills --kills 20 --ranks 2 [--section.key value]`.
"""

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from sharpmoe import durable
from sharpmoe.checkpoint import manifest, retention, save
from sharpmoe.config import RunConfig
from sharpmoe.model.weights import SafetensorsWriter
from sharpmoe.overrides import parse_overrides
from sharpmoe.parallel.ranks import launch
from sharpmoe.train import loop
from tests.distributed import CONTEXT, free_port
from tests.fixtures_data import make_shards
from tests.train.setting import identical, make_run, plan_for

STEPS, EVERY = 8, 2
SLOW = 0.02  # seconds before and after each change of the disk
_SEVERAL = 25
# Every call with which a save changes the disk.
BOUNDARIES: list[tuple[Any, str]] = [
    (durable, "fresh_folder"),
    (durable, "write_atomically"),
    (Path, "write_text"),
    (durable, "flush_file"),
    (durable, "_flush_folder"),
    (durable, "publish_folder"),
    (durable, "remove_folder"),
    (save, "write_state"),
    (SafetensorsWriter, "write"),  # of a tensor: one in _SEVERAL
    (SafetensorsWriter, "__exit__"),
    (os, "replace"),
    (Path, "rename"),
    (Path, "mkdir"),
]


class Kill(NamedTuple):
    """What one kill met."""

    place: str  # the last boundary that the victim passed
    inside: bool  # a save


class Tally(NamedTuple):
    """Figures of a campaign."""

    kills: list[Kill]
    failed_restarts: list[str]
    differing: list[str]  # losses and weights
    unsound: list[str]  # `latest` that does not verify after a kill

    def line(self) -> str:
        inside = sum(kill.inside for kill in self.kills)
        return (
            f"{len(self.kills)} kills, {inside} inside a save at {len({k.place for k in self.kills if k.inside})} "
            f"different places; failed restarts {len(self.failed_restarts)}, differing losses or weights "
            f"{len(self.differing)}, unsound latest {len(self.unsound)}"
        )


class Attempt:
    """The processes of one start of a run, and what they say as they go."""

    def __init__(self, run: RunConfig, ranks: int, notes: Path, slow: float) -> None:
        self.notes = notes
        notes.mkdir(parents=True)
        port = free_port()
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(target=_rank, args=(rank, ranks, port, run, notes, slow), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def lines(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.is_file() else []

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, ready: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until `ready`, or until a rank has ended."""
        deadline = time.monotonic() + seconds
        while self.alive() and not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.notes}: nothing happened for {seconds} s")
            time.sleep(0.005)

    def end(self) -> None:
        """End all ranks that are left, as a launcher does."""
        for process in self.processes:
            process.kill()
            process.join()


def _rank(rank: int, ranks: int, port: int, run: RunConfig, notes: Path, slow: float) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    with (notes / f"output{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if slow:
        for owner, name in BOUNDARIES:
            setattr(owner, name, _announced(getattr(owner, name), name, notes / f"saving{rank}", slow))
        save.Checkpoints._write = _announced(save.Checkpoints._write, "save", notes / f"saving{rank}", 0.0)  # type: ignore
    _record(notes, rank)
    world = launch.start()
    loop.train(plan_for(run, world), world)
    _append(notes / f"done{rank}", "done")
    os._exit(0)


def _announced(function: Callable[..., Any], name: str, notes: Path, slow: float) -> Callable[..., Any]:
    """The function, saying when it begins and ends, and taking its time."""
    calls = itertools.count()

    @wraps(function)
    def announced(*args: Any, **kwargs: Any) -> Any:
        if name == "write" and next(calls) % _SEVERAL:
            return function(*args, **kwargs)
        for when in ("before", "after"):
            _append(notes, f"{when} {name}")
            time.sleep(slow)
            if when == "before":
                result = function(*args, **kwargs)
        return result

    return announced


def _record(notes: Path, rank: int) -> None:
    """Have the loop tell where it begins, and each step's loss to the last bit."""
    open_session, train_step = loop.open_session, loop.train_step

    def opening(plan: Any, *args: Any) -> Any:
        session = open_session(plan, *args)
        _append(notes / f"start{rank}", str(plan.start.step))
        return session

    def stepping(engine: Any, objective: Any, ema: Any, items: Any, step: int, *args: Any) -> Any:
        result = train_step(engine, objective, ema, items, step, *args)
        _append(notes / f"losses{rank}", f"{step + 1} {float(result.losses['total']).hex()}")
        return result

    loop.open_session, loop.train_step = opening, stepping  # type: ignore[assignment]


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


class Reference(NamedTuple):
    """What a run that nobody killed does."""

    losses: dict[str, str]
    weights: dict[str, dict[str, torch.Tensor]]
    boundaries: list[list[str]]  # that each rank passes in a whole run


def campaign(folder: Path, base: RunConfig, ranks: int, kills: int, seed: int = 0) -> Tally:
    """Kill and restart until `kills` ranks were killed and the run under way has ended."""
    rng = random.Random(seed)
    tally = Tally([], [], [], [])
    reference = _reference(folder, base, ranks)
    for turn in range(1 + kills):
        if len(tally.kills) < kills:
            _one_run(base.model_copy(update={"name": f"run{turn}"}), ranks, kills, reference, tally, rng)
    return tally


def _reference(folder: Path, base: RunConfig, ranks: int) -> Reference:
    run = base.model_copy(update={"name": "reference"})
    attempt = Attempt(run, ranks, folder / "reference" / "notes", slow=1e-4)
    attempt.wait(lambda: False)
    for process in attempt.processes:
        process.join(60)
    assert attempt.lines("done0"), _last_words(attempt)
    boundaries = [attempt.lines(f"saving{rank}") for rank in range(ranks)]
    return Reference(_losses(attempt), _weights(run), boundaries)


def _one_run(run: RunConfig, ranks: int, kills: int, reference: Reference, tally: Tally, rng: random.Random) -> None:
    """Start, kill, check, start again, until the run comes to its end."""
    root = Path(run.output) / run.name / "checkpoints"
    for number in range(4 * kills + 4):
        # A kill between the folder's name and `latest` leaves a whole checkpoint; without a former one, it is taken.
        saved = next(iter(retention.newest_first(root)), None)
        expected = str(manifest.read_manifest(saved).progress.step) if saved else "0"
        attempt = Attempt(run, ranks, root.parent / "notes" / str(number), SLOW)
        victim = rng.randrange(ranks) if len(tally.kills) < kills else None
        met = _kill(attempt, victim, reference, rng)
        for process in attempt.processes:
            process.join(0.3 if met else 60)
        attempt.end()
        name = f"{run.name}, start {number}"
        started = attempt.lines("start0")
        if (started or not met) and started != [expected]:
            tally.failed_restarts.append(f"{name}: began at {started}, not {expected}: {_last_words(attempt)}")
        tally.differing.extend(
            f"{name}: step {step}: {loss}" for step, loss in _losses(attempt).items() if reference.losses[step] != loss
        )
        tally.unsound.extend(_unsound(root))
        if met:
            tally.kills.append(met)
        elif attempt.lines("done0"):
            break
        else:
            tally.failed_restarts.append(f"{name}: ended by itself: {_last_words(attempt)}")
            break
    else:
        tally.failed_restarts.append(f"{run.name}: came to no end")
    if not tally.failed_restarts:
        weights = _weights(run)
        tally.differing.extend(name for name in weights if not identical(weights[name], reference.weights[name]))


def _kill(attempt: Attempt, victim: int | None, reference: Reference, rng: random.Random) -> Kill | None:
    """Kill a rank at a random kind of boundary or, one time in four, at a random step; None where it ended."""
    if victim is None:
        attempt.wait(lambda: False)
        return None
    passed, steps = f"saving{victim}", f"losses{victim}"
    if rng.random() < 0.75:
        kind = rng.choice(sorted(set(reference.boundaries[victim])))
        at = rng.randrange(1, 2 + reference.boundaries[victim].count(kind) // 2)
        attempt.wait(lambda: attempt.lines(passed).count(kind) >= at)
    else:
        at = rng.randrange(STEPS)
        attempt.wait(lambda: len(attempt.lines(steps)) >= at and bool(attempt.lines("start0")))
        time.sleep(rng.random() * 0.3)
    if not attempt.alive():
        return None
    os.kill(attempt.processes[victim].pid, signal.SIGKILL)  # type: ignore[arg-type]
    attempt.processes[victim].join()
    if attempt.processes[victim].exitcode != -signal.SIGKILL:
        return None  # it had ended meanwhile
    lines = attempt.lines(passed)
    return Kill(lines[-1] if lines else "no save yet", _inside(lines))


def _inside(lines: Sequence[str]) -> bool:
    """Whether a save had begun and not ended."""
    return lines.count("before save") > lines.count("after save")


def _unsound(root: Path) -> Iterator[str]:
    latest = retention.latest(root)
    if latest is None:
        return
    try:
        manifest.verify_checkpoint(latest)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
        yield f"{latest}: {error}"


def _losses(attempt: Attempt) -> dict[str, str]:
    complete = [line.split() for line in attempt.lines("losses0")]
    return {words[0]: words[1] for words in complete if len(words) == 2}


def _weights(run: RunConfig) -> dict[str, dict[str, torch.Tensor]]:
    root = Path(run.output) / run.name / "checkpoints"
    folder = retention.latest(root)
    assert folder is not None
    return {name: load_file(folder / f"{name}.safetensors") for name in ("live", "ema")}


def _last_words(attempt: Attempt) -> str:
    texts = []
    for rank in range(len(attempt.processes)):
        with suppress(OSError):
            texts.append((attempt.notes / f"output{rank}").read_text()[-1500:])
    return "\n".join(texts)


def killed_run(shards: Path, output: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The small run that is killed: a save every other step, and milestones."""
    sections: dict[str, Any] = {
        "train": {"steps": STEPS, "micro_batch": None},
        "checkpoint": {"every": EVERY, "keep": 2, "resume": "auto"},
    }
    for key, value in parse_overrides(overrides).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return make_run(shards, output, **sections)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = killed_run(make_shards(folder / "shards"), folder, overrides)
        tally = campaign(folder, run, arguments.ranks, arguments.kills, arguments.seed)
    for kill in tally.kills:
        print(f"killed at: {kill.place}{', inside a save' if kill.inside else ''}")
    for trouble in (*tally.failed_restarts, *tally.differing, *tally.unsound):
        print(trouble)
    print(tally.line())
    return int(bool(tally.failed_restarts or tally.differing or tally.unsound))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
