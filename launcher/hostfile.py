"""Write the hostfile of `deepspeed --hostfile` from a Slurm job: `python launcher/hostfile.py --slots 8 > hostfile`."""

import argparse
import sys
from collections.abc import Sequence

from sharpmoe import slurm
from sharpmoe.errors import SharpMoEError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, ask Slurm, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--slots", type=int, help="ranks per node (default: the GPUs that Slurm gave this job per node)"
    )
    try:
        print(slurm.hostfile(slurm.nodes_of_job(), parser.parse_args(argv).slots), end="")
    except SharpMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
