"""Train a run from Python: what `launcher/train.py` does, as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharpmoe.config_io import DEFAULT_DS_CONFIG, load_run_config
from sharpmoe.parallel.ranks import launch, signals
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.auto import resolve_schedule
from sharpmoe.planning.disk import check_first_checkpoint
from sharpmoe.train.loop import train
from sharpmoe.train.setup import make_plan


def train_run(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    deepspeed: str | Path = DEFAULT_DS_CONFIG,
    callbacks: Sequence[object] = (),
    debug: bool = False,
) -> Path:
    """Train a run to its last step, or to where a signal stops it; return the folder of its last checkpoint.

    `config` is a run file, by default the quickstart's; `overrides` are words of a command line (`--section.key value`)
    and `changes` sections and keys as in a run file, below the overrides. `deepspeed`: the DeepSpeed JSON. `callbacks`:
    objects with some of the methods of `sharpmoe.TrainingCallback`, called on rank 0 beside those of log.callbacks.

    One process is a run on one rank; `torchrun` or `deepspeed` start a script that calls this on several, each of which
    must call it alike. For the main thread: SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) stop the run after a save, of which
    the last raises KeyboardInterrupt. The process group stays. `debug` shows warnings of other libraries. Communicates;
    raises SharpMoEError on every rank.
    """
    with signals.listening(announce=launch.is_main()):
        world = launch.start(debug=debug)
        with launch.raise_on_all_ranks(world):
            requested = load_run_config(config, overrides, changes)
            ds_config = resolve_ds_config(Path(deepspeed), requested, world.size)
        memory = launch.least_memory(world)
        with launch.raise_on_all_ranks(world):
            run, notes = resolve_schedule(requested, ds_config, world.size, memory)
            plan = make_plan(run, ds_config, world, notes)
            if world.is_main:
                plan = replace(plan, notes=(*plan.notes, *check_first_checkpoint(plan)))
        return train(plan, world, callbacks)
