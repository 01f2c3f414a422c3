"""Submit a run to Slurm: `python launcher/submit.py --config FILE --nodes 4 --gpus-per-node 8`.

Words that are not options are passed on: overrides of the run file (`--section.key value`), or with --job prepare and
--job sample the options of that command. A run is checked first (`python launcher/train.py --dry-run` for the ranks
of the job).
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from collections.abc import Iterator
from pathlib import Path

from launcher.bounds import NOT_NEGATIVE, POSITIVE, POSITIVE_REAL, Whole
from launcher.command import Command, Unread
from sharpmoe import slurm
from sharpmoe.config_io import DEFAULT_DS_CONFIG, DEFAULT_RUN_CONFIG
from sharpmoe.console import print_note


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, default=DEFAULT_RUN_CONFIG, help="run file (default: configs/runs/quickstart.yaml)")
    add("--job", choices=tuple(slurm.TEMPLATES), default="posttrain", help="what to do with the run")
    add("--nodes", type=POSITIVE, help="nodes, with one task on each (default: 1)")
    add(
        "--gpus-per-node", type=NOT_NEGATIVE, help="GPUs, and ranks, per node; 0 on a cluster without GPUs (default: 8)"
    )
    add("--ranks-per-node", type=POSITIVE, help="ranks per node, if not one per GPU")
    add("--cpus-per-node", type=POSITIVE, help="share nodes and take this many CPUs of each (default: whole nodes)")
    add("--time", help="time limit, such as 24:00:00 or 2-12; a run that reaches it saves a checkpoint and is requeued")
    add(
        "--grace",
        type=Whole(1, slurm.LONGEST_GRACE),
        help="seconds before the time limit at which the run saves (default: 180)",
    )
    add("--partition", help="partition of the cluster")
    add("--array", type=POSITIVE, help="sample: number of tasks that share the images (default: 8)")
    add("--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help="another option of sbatch; repeatable")
    add("--srun", action="append", default=[], metavar="--OPTION=VALUE", help="another option of srun; repeatable")
    add(
        "--setup",
        type=Path,
        metavar="FILE",
        help="shell lines that the job sources first (modules, PYTHON)",
    )
    add("--no-check", action="store_true", help="submit without the check that a run will start (--dry-run of `train`)")
    add(
        "--device-memory",
        type=POSITIVE_REAL,
        metavar="GIB",
        help="memory of a GPU, for the check (else left out)",
    )
    add("--deepspeed", type=Path, default=DEFAULT_DS_CONFIG, help="DeepSpeed JSON (default: configs/zero3.json)")
    add("--dry-run", action="store_true", help="print the batch file and submit nothing")


def _unread(arguments: argparse.Namespace) -> Iterator[Unread]:
    of_a_run = ("--ranks-per-node", "--deepspeed", "--device-memory", "--no-check")
    if arguments.job != "posttrain":
        yield Unread(f"with --job {arguments.job}", of_a_run)


def _act(arguments: argparse.Namespace) -> None:
    batch = slurm.make_batch_file(_job(arguments), _resources(arguments))
    if arguments.dry_run:
        print(batch.text, end="")
        return
    slurm.check_python(arguments.setup)
    if batch.check and not arguments.no_check:
        print_note("checking that the run will start, as `train --dry-run` does (--no-check submits without it) ...")
    said = "" if arguments.no_check else slurm.check_start(batch)
    if said:
        print(said, flush=True)
    print(slurm.commands_for(batch, slurm.submit(batch)))


def _job(arguments: argparse.Namespace) -> slurm.SlurmJob:
    return slurm.SlurmJob(
        kind=arguments.job,
        run_file=arguments.config,
        ds_config=arguments.deepspeed,
        words=arguments.overrides,
        ranks_per_node=arguments.ranks_per_node,
        setup=arguments.setup,
        srun=tuple(arguments.srun),
        device_memory=arguments.device_memory,
    )


def _resources(arguments: argparse.Namespace) -> slurm.Resources:
    return slurm.Resources(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_node=arguments.cpus_per_node,
        time=arguments.time,
        partition=arguments.partition,
        grace=arguments.grace,
        array=arguments.array,
        more=tuple(arguments.sbatch),
    )


main = Command(text=__doc__, arguments=_arguments, act=_act, unread=_unread, overrides=True)

if __name__ == "__main__":
    main.run()
