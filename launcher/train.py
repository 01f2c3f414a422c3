"""Train a run: `deepspeed launcher/train.py --deepspeed configs/zero3.json [--config FILE] [--section.key value ...]`.

`torchrun` and plain `python` start the same run.
"""

import sys
from collections.abc import Sequence

from launcher.arguments import parse_train_arguments
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import SharpMoEError
from sharpmoe.parallel.ranks import launch, signals
from sharpmoe.parallel.ranks.device_memory import least_memory
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.auto import decide
from sharpmoe.train.loop import train
from sharpmoe.train.rehearsal import rehearse
from sharpmoe.train.setup import make_plan


def main(argv: Sequence[str]) -> int:
    """Run; returns the exit code: 0, or 2 on every rank after an error, which rank 0 prints as one line.

    0 also where SIGTERM or SIGUSR1 stopped the run: it has saved itself and goes on when it is started again. Without
    coming back: 3 where another rank is lost, 128 + its number after a second signal.
    """
    try:
        with signals.listening():
            return _run(argv)
    except SharpMoEError as error:
        if launch.is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        launch.stop()


def _run(argv: Sequence[str]) -> int:
    world = launch.start()
    with launch.together(world):
        arguments = parse_train_arguments(argv)
        asked = load_run_config(arguments.config, arguments.overrides)
        ds_config = resolve_ds_config(arguments.ds_config, asked, world.size)
    memory = least_memory(world)
    with launch.together(world):
        run, notes = decide(asked, ds_config, world.size, memory)
        plan = None if arguments.dry_run else make_plan(run, ds_config, world, notes)
        told = rehearse(run, ds_config, world, notes) if plan is None else ""
    if plan is not None:
        train(plan, world)
    elif world.is_main:
        print(told, flush=True)
    return 0


if __name__ == "__main__":
    launch.leave(main(sys.argv[1:]))
