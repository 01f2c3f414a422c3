"""Hand a run in to Slurm: `python launcher/submit.py --config FILE --nodes 4 --gpus-per-node 8`.

The words that are not options are handed on: overrides of the run file (`--section.key value`), or with --job prepare
and sample the options of launcher/prepare.py and launcher/sample.py.
"""

import argparse
from pathlib import Path

from launcher.command import Command
from sharpmoe import slurm
from sharpmoe.config_io import DEFAULT_DS_CONFIG, DEFAULT_RUN_CONFIG
from sharpmoe.slurm import Job, Resources


def _act(arguments: argparse.Namespace) -> None:
    batch = slurm.make_batch(_job(arguments), _resources(arguments))
    if arguments.dry_run:
        print(batch.text, end="")
    else:
        print(slurm.follow(batch, slurm.submit(batch)))


def _job(arguments: argparse.Namespace) -> Job:
    return Job(arguments.job, arguments.config, arguments.deepspeed, arguments.overrides, arguments.ranks_per_node)


def _resources(arguments: argparse.Namespace) -> Resources:
    return Resources(
        arguments.nodes,
        arguments.gpus_per_node,
        arguments.cpus_per_node,
        arguments.time,
        arguments.partition,
        arguments.grace,
        arguments.array,
        tuple(arguments.sbatch),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, default=DEFAULT_RUN_CONFIG, help="run file (default: configs/runs/quickstart.yaml)")
    add("--job", choices=tuple(slurm.TEMPLATES), default="posttrain", help="what is done with the run")
    add("--nodes", type=int, help="nodes, one task on each (default: 1)")
    add("--gpus-per-node", type=int, help="GPUs, and ranks, per node; 0 on a cluster without (default: 8)")
    add("--ranks-per-node", type=int, help="where it is not the number of GPUs")
    add("--cpus-per-node", type=int, help="share nodes and take so many CPUs of each (default: whole nodes)")
    add("--time", help="time limit, such as 24:00:00; a run that meets it saves itself and is queued again")
    add("--grace", type=int, help="seconds before the time limit at which it does (default: 180)")
    add("--partition", help="partition of the cluster")
    add("--array", type=int, help="sample: tasks that share the images (default: 8)")
    add(
        "--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help="any other option of sbatch; repeatable"
    )
    add("--deepspeed", type=Path, default=DEFAULT_DS_CONFIG, help="DeepSpeed JSON (default: configs/zero3.json)")
    add("--dry-run", action="store_true", help="print the batch file, hand nothing in")


main = Command(text=__doc__, arguments=_arguments, act=_act, overrides=True)

if __name__ == "__main__":
    main.run()
