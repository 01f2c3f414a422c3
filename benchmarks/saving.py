"""Cost of a save during training: steps while a checkpoint is written, in turn with steps while none is.

torchrun --nproc_per_node 2 -m benchmarks.saving --rounds 6 [--section.key value ...]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.checkpoint.save import Outcome
from sharpmoe.config_io import load_run_config
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.train import loop
from sharpmoe.train.session import Session, open_session
from sharpmoe.train.setup import initial_model, make_plan


class Took(NamedTuple):
    """Times of one step."""

    seconds: float
    processor: float  # processor seconds of all threads of this rank: other work on the machine hardly affects them


class Round(NamedTuple):
    """Steps without a save, then the steps from the start of a save to its end."""

    quiet: list[Took]
    saving: list[Took]
    outcome: Outcome


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
        launch.gather_objects(None, world)  # rank 0's folder stays until all ranks are done
    if world.is_main:
        report(rounds)
    launch.leave(0)


def _begin_and_step(session: Session, steps: Iterator[Progress], number: int) -> None:
    session.checkpoints.begin(Progress(number, 0))
    next(steps)


def measure(session: Session, count: int) -> list[Round]:
    """Time steps with and without a save in turn, without the first turn of each."""
    steps = loop._steps(session)
    size, rounds = 3, []
    for turn in range(count + 1):
        quiet = [timed(lambda: next(steps)) for _ in range(size)]
        saving = [timed(partial(_begin_and_step, session, steps, turn + 1))]
        while not all(launch.gather_objects(session.checkpoints._running.done(), session.world)):  # type: ignore[union-attr]
            saving.append(timed(lambda: next(steps)))
        outcome = session.checkpoints.wait()
        assert outcome is not None
        assert outcome.error is None
        size = max(3, len(saving))
        rounds.append(Round(quiet, saving, outcome))
    return rounds[1:]


def timed(work: Callable[[], object]) -> Took:
    """Call a function and return its times."""
    began, busy = time.monotonic(), time.process_time()
    work()
    return Took(time.monotonic() - began, time.process_time() - busy)


def report(rounds: Sequence[Round]) -> None:
    quiet = [took for each in rounds for took in each.quiet]
    saving = [took for each in rounds for took in each.saving]
    stalled = statistics.mean(each.outcome.stalled for each in rounds)
    seconds = statistics.mean(each.outcome.seconds for each in rounds)
    print(
        f"step without a save and while saving: {_rise(quiet, saving, 'seconds')}; processor time of a rank "
        f"{_rise(quiet, saving, 'processor')}; a save stalls {stalled:.3f} s and takes {seconds:.2f} s, "
        f"{len(saving) / len(rounds):.1f} steps (means of {len(rounds)} saves)"
    )


def _rise(quiet: Sequence[Took], saving: Sequence[Took], field: str) -> str:
    before, after = (statistics.mean(getattr(took, field) for took in steps) for steps in (quiet, saving))
    return f"{before:.3f} s and {after:.3f} s ({after / before - 1:+.1%})"


if __name__ == "__main__":
    main()
