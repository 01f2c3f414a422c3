"""Estimate memory and traffic of a run: `python launcher/plan.py --config RUN --world 64 --ep 8 --zero 3`.

Prints bytes per rank and bytes sent per optimizer step for every rollout schedule (docs/planning.md). Nothing is
allocated; exit code 1 if the run as configured does not fit the device.

With --replay it reads the routing that `python launcher/evaluate.py RUN --record-routing FILE` recorded, and prints
how unevenly it loads the ranks that share the experts, and the bytes that they exchange, for --ep or every possible
ep_size.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from launcher.bounds import NOT_NEGATIVE, POSITIVE, POSITIVE_REAL, Whole
from launcher.command import OVERRIDES_HELP, Command, Unread
from sharpmoe.config_io import load_run_config
from sharpmoe.evaluation.routing_record import RoutingRecord
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.advice import advise, usable
from sharpmoe.planning.auto import resolve_planner
from sharpmoe.planning.estimate import Planner
from sharpmoe.planning.replay import replay_json, replay_routing, replay_text
from sharpmoe.planning.table import as_json, as_text
from sharpmoe.shipped_files import SHIPPED_ROOT
from sharpmoe.train.rollout_schedules import SCHEDULES, schedule_overrides


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="run file (default: configs/runs/quickstart.yaml)")
    add("--world", type=POSITIVE, default=8, help="ranks")
    add("--ep", type=POSITIVE, help="ranks that share the experts of a layer (default: parallel.ep_size of the run)")
    add(
        "--zero",
        type=Whole(2, 3),
        choices=(2, 3),
        help="ZeRO stage (default: that of the DeepSpeed file, 3 without one)",
    )
    add("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON (default: configs/zero<stage>.json)")
    add("--micro-batch", type=POSITIVE, help="images per rank and engine call (default: train.micro_batch)")
    add(
        "--tokens",
        type=POSITIVE,
        metavar="N",
        help="tokens per image (default: the largest resolution of the prepared data, else the square of the model)",
    )
    add(
        "--schedule",
        choices=("auto", *SCHEDULES),
        help="rollout schedule (default: that of the run); auto: the cheapest that fits",
    )
    add("--kept-steps", type=NOT_NEGATIVE, help="rollout.kept_steps, for --schedule hybrid and segments")
    add("--segment-steps", type=POSITIVE, help="rollout.segment_steps, for --schedule segments")
    add("--device-memory", type=POSITIVE_REAL, default=80.0, metavar="GIB", help="memory of a device in GiB")
    add("--replay", type=Path, metavar="FILE", help="recorded routing: print its load on ranks in place of the plan")
    add("--json", action="store_true", help="print JSON")


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    if arguments.replay is not None:
        of_a_plan = ("--world", "--zero", "--deepspeed", "--tokens", "--schedule", "--kept-steps", "--segment-steps")
        yield Unread("with --replay", (*of_a_plan, "--device-memory"))


def _act(arguments: argparse.Namespace) -> int:
    if arguments.replay is not None:
        return _replay(arguments)
    run = load_run_config(arguments.config, [*_shorthands(arguments), *arguments.overrides])
    file = arguments.deepspeed or SHIPPED_ROOT / "configs" / f"zero{arguments.zero or 3}.json"
    ds_config = resolve_ds_config(file, run, arguments.world)
    ds_config["zero_optimization"]["stage"] = arguments.zero or ds_config["zero_optimization"]["stage"]
    planner = Planner(run, arguments.tokens)
    layout = planner.layout(arguments.world, ds_config)
    planner, notes = resolve_planner(planner, layout, arguments.device_memory)
    budget = planner.budget(layout)
    advice = advise(planner, budget, arguments.device_memory)
    if arguments.json:
        print(json.dumps(as_json(budget, advice, arguments.device_memory, notes), indent=1))
    else:
        print(as_text(budget, advice, arguments.device_memory, notes))
    return 0 if budget.own.memory.peak <= usable(arguments.device_memory) else 1


def _replay(arguments: argparse.Namespace) -> int:
    record, run = RoutingRecord.load(arguments.replay), load_run_config(arguments.config, arguments.overrides)
    sizes = [arguments.ep] if arguments.ep else record.ep_sizes
    micro_batch = arguments.micro_batch or run.train.micro_batch or 1
    found = [replay_routing(record, ep_size, micro_batch, run.train.precision) for ep_size in sizes]
    print(json.dumps(replay_json(record, found), indent=1) if arguments.json else replay_text(record, found))
    return 0


def _shorthands(arguments: argparse.Namespace) -> list[str]:
    given = {
        "train.micro_batch": arguments.micro_batch,
        "parallel.ep_size": arguments.ep,
        "rollout.kept_steps": arguments.kept_steps,
        "rollout.segment_steps": arguments.segment_steps,
    }
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    return [*(schedule_overrides(arguments.schedule) if arguments.schedule else ()), *words]


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread, overrides=True, epilog=OVERRIDES_HELP)

if __name__ == "__main__":
    main.run()
