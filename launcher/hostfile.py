"""Write the hostfile of `deepspeed --hostfile` from a Slurm job: `python launcher/hostfile.py --slots 8 > hostfile`."""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse

from launcher.bounds import POSITIVE
from launcher.command import Command
from sharpmoe import slurm


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", type=POSITIVE, help="ranks per node (default: the GPUs that Slurm gave this job per node)"
    )


def _act(arguments: argparse.Namespace) -> None:
    print(slurm.hostfile(slurm.nodes_of_job(), arguments.slots), end="")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
