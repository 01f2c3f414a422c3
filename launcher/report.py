"""Write a static HTML page of a run: `python launcher/report.py runs/quickstart`."""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from pathlib import Path

from launcher.command import Command
from sharpmoe.report.page import write_page


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, such as runs/quickstart")


def _act(arguments: argparse.Namespace) -> None:
    print(write_page(arguments.run))


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
