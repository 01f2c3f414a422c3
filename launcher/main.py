"""Console command: `sharpmoe NAME ...` does what `python launcher/NAME.py ...` does."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.command import Command

# A launcher is imported when it is named: the list of them needs no torch.
_LAUNCHERS = {
    "prepare": "turn images and captions into shards",
    "train": "pretrain a base, or post-train it with SharpMoE",
    "sample": "draw images",
    "evaluate": "measure where models spend their experts on held-out images",
    "ablate": "train, measure and compare the arms of a study",
    "report": "write a static HTML page of a run",
    "plan": "estimate memory and traffic of a run before it is started",
    "identify": "report family, sizes and time convention of a published checkpoint",
    "convert": "convert published weights to a weights file of this project, and back",
    "export": "copy the weights of a checkpoint to one file",
    "shards": "verify, describe, show or merge prepared shards",
    "submit": "submit a run to Slurm",
    "hostfile": "write the hostfile of a Slurm job for `deepspeed --hostfile`",
}


def main(words: Sequence[str]) -> int:
    """Run the launcher that the first word names and return its exit code; 2 where no launcher has that name."""
    launcher = _launcher(words)
    return launcher if isinstance(launcher, int) else launcher(words[1:], f"sharpmoe {words[0]}")


def run() -> NoReturn:
    """Run with the words of this process and end it as the launcher ends itself."""
    words = sys.argv[1:]
    launcher = _launcher(words)
    if isinstance(launcher, int):
        sys.exit(launcher)
    launcher.leave(launcher(words[1:], f"sharpmoe {words[0]}"))


def _launcher(words: Sequence[str]) -> Command | int:
    """The launcher to run, or the exit code where help was printed or the name is wrong."""
    name = words[0] if words else ""
    if name in _LAUNCHERS:
        command: Command = importlib.import_module(f"launcher.{name}").main
        return command
    if name in ("-h", "--help"):
        rows = [f"  {launcher:<10}{text}" for launcher, text in _LAUNCHERS.items()]
        print("usage: sharpmoe COMMAND ...\n", *rows, "\n`sharpmoe COMMAND --help` lists the options.", sep="\n")
        return 0
    close = difflib.get_close_matches(name, _LAUNCHERS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_LAUNCHERS)}"
    found = f"unknown command {name!r}" if words else "no command given"
    print(f"error: sharpmoe: {found}; {hint} (`sharpmoe --help` describes them)", file=sys.stderr)
    return 2
