"""Report on runs: verdict, tables and an HTML page: `python launcher/report.py runs/quickstart [runs/other ...]`."""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import json
from pathlib import Path

from launcher.command import Command
from sharpmoe.console import print_note
from sharpmoe.report.page import write_report
from sharpmoe.report.run_table import console_report


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the first is what others are compared with")
    add("--out", type=Path, help="the page (default: report.html in the run folder, of several runs beside the first)")
    add("--json", action="store_true", help="print the document that table and page are made of, not the table")


def _act(arguments: argparse.Namespace) -> None:
    path, document = write_report(arguments.runs, arguments.out)
    if arguments.json:
        print(json.dumps(document, allow_nan=False))
    else:
        print(console_report(document))
    print_note(f"written: {path} and {path.with_suffix('.json').name}")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
