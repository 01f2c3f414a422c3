"""Train a run: pretrain a base, or post-train it with SharpMoE.

`deepspeed launcher/train.py --deepspeed configs/zero3.json [--config FILE] [--section.key value ...]`; `torchrun` and
plain `python` start the same run.

Exit codes: 0, also where SIGTERM or SIGUSR1 stopped the run, which has saved itself and continues when it is started
again; 130 where Ctrl-C (SIGINT) stopped it, after the same save; 2 on every rank after an error, which rank 0 prints as
one line; 3 where another rank is lost; 128 + the number of a second signal.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from collections.abc import Iterator
from pathlib import Path

from launcher.bounds import POSITIVE, POSITIVE_REAL, Whole
from launcher.command import INTERRUPTED, OVERRIDES_HELP, Command, Unread
from sharpmoe.config_io import DEFAULT_DS_CONFIG, load_run_config
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.rehearsal import Target, rehearse
from sharpmoe.training import train_run


def _arguments(parser: argparse.ArgumentParser) -> None:
    """Accept `--deepspeed FILE`, `--deepspeed --deepspeed_config FILE` and neither: all start the same run.

    DeepSpeed's own `add_config_arguments` is not used, because it makes `--deepspeed` a flag. `--local_rank`, which
    the `deepspeed` command appends, is accepted and unused: the rank comes from the environment.
    """
    add = parser.add_argument
    add("--deepspeed", nargs="?", type=Path, metavar="FILE", help="DeepSpeed JSON (default: configs/zero3.json)")
    add("--deepspeed_config", type=Path, metavar="FILE", help="the same, in DeepSpeed's spelling of two words")
    add("--config", type=Path, metavar="FILE", help="run file (default: configs/runs/quickstart.yaml)")
    add("--dry-run", action="store_true", help="check that the run will start, change nothing, and end with `ok`")
    add("--world", type=POSITIVE, help="--dry-run: number of ranks that the run will have (default: those started)")
    add("--device-memory", type=POSITIVE_REAL, metavar="GIB", help="--dry-run: memory of a device, if not of one here")
    add("--local_rank", "--local-rank", type=Whole(-1), help=argparse.SUPPRESS)


def _ds_file(arguments: argparse.Namespace) -> Path:
    first, second = arguments.deepspeed, arguments.deepspeed_config
    if first and second and first != second:
        raise ConfigError(f"--deepspeed names {first} and --deepspeed_config names {second}; give one DeepSpeed file")
    return first or second or DEFAULT_DS_CONFIG


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if not arguments.dry_run:
        yield Unread("without --dry-run", ("--world", "--device-memory"))


def _act(arguments: argparse.Namespace) -> int:
    debug = getattr(arguments, "debug", False)
    if arguments.dry_run:
        _rehearse(arguments, debug)
        return 0
    try:
        train_run(arguments.config, arguments.overrides, deepspeed=_ds_file(arguments), debug=debug)
    except KeyboardInterrupt:  # the run has said so, and where it is saved
        return INTERRUPTED
    return 0


def _rehearse(arguments: argparse.Namespace, debug: bool) -> None:
    world = launch.start(debug=debug)
    with launch.raise_on_all_ranks(world):
        requested = load_run_config(arguments.config, arguments.overrides)
        ds_config = resolve_ds_config(_ds_file(arguments), requested, arguments.world or world.size)
    target = Target.of(world, launch.least_memory(world), arguments.world, arguments.device_memory)
    with launch.raise_on_all_ranks(world):
        text = rehearse(requested, ds_config, world, target)
    if world.is_main:
        print(text, flush=True)


main = Command(
    text=__doc__,
    arguments=_arguments,
    act=_act,
    unread=_unread,
    overrides=True,
    epilog=OVERRIDES_HELP,
    reports=launch.is_main,
    cleanup=launch.stop,
    leave=launch.leave,
)

if __name__ == "__main__":
    main.run()
