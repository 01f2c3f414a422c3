"""Write a static HTML page of a run: `python launcher/report.py runs/quickstart`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpmoe.errors import SharpMoEError
from sharpmoe.report import page


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, say where it is; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, such as runs/quickstart")
    try:
        print(page.build(parser.parse_args(argv).run))
    except SharpMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
