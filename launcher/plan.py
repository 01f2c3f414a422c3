"""What a layout takes, before anything is started: `python launcher/plan.py --config RUN --world 64 --ep 8 --zero 3`.

Prints bytes per rank and bytes sent per optimizer step for every rollout schedule (docs/planning.md). Nothing is
allocated; exit code 1 where the run as configured does not fit the device.
"""

import argparse
import json
from pathlib import Path

from launcher.command import OVERRIDES_HELP, Command
from sharpmoe.config_io import PROJECT_ROOT, load_run_config
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.planning.advice import advise, usable
from sharpmoe.planning.auto import resolve_planner
from sharpmoe.planning.estimate import Planner
from sharpmoe.planning.table import as_json, text

# What --schedule stands for in the run file; keys that go with the schedule that is there are unset.
_UNSET = ("--rollout.kept_steps=null", "--rollout.segment_steps=1", "--rollout.merged_steps=1")
SCHEDULES = {name: (f"--rollout.schedule={name}", *_UNSET) for name in ("auto", "plain", "checkpoint", "two_pass")} | {
    "hybrid": ("--rollout.schedule=hybrid", *_UNSET[1:]),
    "segments": ("--rollout.schedule=segments", *_UNSET[2:]),
}


def _act(arguments: argparse.Namespace) -> int:
    run = load_run_config(arguments.config, [*_shorthands(arguments), *arguments.overrides])
    file = arguments.deepspeed or PROJECT_ROOT / "configs" / f"zero{arguments.zero or 3}.json"
    ds_config = resolve_ds_config(file, run, arguments.world)
    ds_config["zero_optimization"]["stage"] = arguments.zero or ds_config["zero_optimization"]["stage"]
    planner = Planner(run)
    layout = planner.layout(arguments.world, ds_config)
    planner, notes = resolve_planner(planner, layout, arguments.device_memory)
    budget = planner.budget(layout)
    advice = advise(planner, budget, arguments.device_memory)
    told = as_json(budget, advice, arguments.device_memory, notes) if arguments.json else None
    print(text(budget, advice, arguments.device_memory, notes) if told is None else json.dumps(told, indent=1))
    return 0 if budget.own.memory.peak <= usable(arguments.device_memory) else 1


def _shorthands(arguments: argparse.Namespace) -> list[str]:
    given = {
        "train.micro_batch": arguments.micro_batch,
        "parallel.ep_size": arguments.ep,
        "rollout.kept_steps": arguments.kept_steps,
        "rollout.segment_steps": arguments.segment_steps,
    }
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    return [*SCHEDULES.get(arguments.schedule, ()), *words]


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="run file (default configs/runs/quickstart.yaml)")
    add("--world", type=int, default=8, help="ranks (default 8)")
    add("--ep", type=int, help="ranks that share the experts of a layer (default: parallel.ep_size of the run)")
    add("--zero", type=int, choices=(2, 3), help="ZeRO stage (default: that of the DeepSpeed file, 3 without one)")
    add("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON (default configs/zero<stage>.json)")
    add("--micro-batch", type=int, help="images per rank and engine call (default: train.micro_batch)")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="rollout schedule (default: that of the run); auto: the cheapest that fits",
    )
    add("--kept-steps", type=int, help="rollout.kept_steps, for --schedule hybrid and segments")
    add("--segment-steps", type=int, help="rollout.segment_steps, for --schedule segments")
    add("--device-memory", type=float, default=80.0, metavar="GIB", help="memory of a device (default 80)")
    add("--json", action="store_true", help="print numbers for a program")


main = Command(text=__doc__, arguments=_arguments, act=_act, overrides=True, epilog=OVERRIDES_HELP)

if __name__ == "__main__":
    main.run()
