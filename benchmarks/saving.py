"""What a save costs the training: steps while one is being written against steps while none is, in turns.

torchrun --nproc_per_node 2 -m benchmarks.saving --rounds 6 [--section.key value ...]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sharpmoe.config_io import load_run_config
from sharpmoe.parallel import launch
from sharpmoe.parallel.ds_config import resolve_ds_config
from sharpmoe.train import loop
from sharpmoe.train.manifest import Progress
from sharpmoe.train.plan import initial_model, make_plan
from sharpmoe.train.saving import Saver
from sharpmoe.train.session import Session, open_session


class Round(NamedTuple):
    quiet: list[float]  # seconds of each step without a save
    saving: list[float]  # of each step from the beginning of a save to its end; the first with what it stalled
    stalled: float
    seconds: float  # the save itself
    busy: float  # seconds of processor time that the saving thread of this rank used


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--deepspeed", default="configs/zero3.json")
    arguments, overrides = parser.parse_known_args(argv)
    world = launch.start()
    with tempfile.TemporaryDirectory() as own:
        folder = launch.gather_objects(own, world)[0]
        run = load_run_config(
            None, ["--log.allocation", "false", "--train.steps", "9999", *overrides, "--output", folder]
        )
        plan = make_plan(run, resolve_ds_config(Path(arguments.deepspeed), run, world.size), world)
        session = open_session(plan, world, initial_model(plan))
        rounds = measure(session, arguments.rounds)
        launch.barrier(world)
    if world.is_main:
        report(rounds)
    launch.leave(0)


def measure(session: Session, count: int) -> list[Round]:
    """Steps in turns with and without a save; the first turn of each is left out."""
    steps, busy = loop._steps(session), _processor_times()
    size, rounds = 3, []
    for turn in range(count + 1):
        quiet = [timed_step(steps)[0] for _ in range(size)]
        began = time.monotonic()
        session.saver.begin(Progress(turn + 1, 0))
        saving: list[float] = []
        while True:
            _, ended = timed_step(steps)
            saving.append(ended - began)
            began = ended
            outcome = session.saver.ended()
            if launch.gather_objects(outcome is not None, session.world) == [True] * session.world.size:
                break
        assert outcome is not None
        assert outcome.error is None
        size = max(3, len(saving))
        rounds.append(Round(quiet, saving, outcome.stalled, outcome.seconds, busy[-1]))
    return rounds[1:]


def _processor_times() -> list[float]:
    """Have every save put down how long its thread was at work."""
    times: list[float] = []
    attempt = Saver._attempt

    def timed(saver: Saver, *args: Any) -> Any:
        began = time.thread_time()
        error = attempt(saver, *args)
        times.append(time.thread_time() - began)
        return error

    Saver._attempt = timed  # type: ignore[method-assign,assignment]
    return times


def timed_step(steps: object) -> tuple[float, float]:
    began = time.monotonic()
    next(steps)  # type: ignore[call-overload]
    ended = time.monotonic()
    return ended - began, ended


def report(rounds: Sequence[Round]) -> None:
    quiet = statistics.median(value for each in rounds for value in each.quiet)
    saving = statistics.median(value for each in rounds for value in each.saving)
    stalled = statistics.mean(each.stalled for each in rounds)
    seconds = statistics.mean(each.seconds for each in rounds)
    steps = statistics.mean(len(each.saving) for each in rounds)
    busy = statistics.mean(each.busy for each in rounds)
    print(
        f"step {quiet:.3f} s without a save, {saving:.3f} s while saving ({saving / quiet - 1:+.1%}); a save stalls "
        f"{stalled:.3f} s and takes {seconds:.2f} s, {steps:.1f} steps, {busy:.2f} s of processor time on rank 0; "
        f"medians and means of {len(rounds)} saves"
    )


if __name__ == "__main__":
    main()
