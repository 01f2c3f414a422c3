"""Console command: `sharpmoe NAME ...` does what `python launcher/NAME.py ...` does."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import sharpmoe
from launcher.command import BROKEN_PIPE, Command, leave_broken_pipe

# A launcher is imported when it is named: the list of them needs no torch.
_TASKS = {
    "start": {
        "quickstart": "prepare images, post-train a base, sample, compare",
    },
    "data": {
        "prepare": "turn images and captions into shards",
        "shards": "verify, show or merge prepared shards, or print their statistics",
    },
    "training": {
        "plan": "estimate memory and traffic of a run before it is started",
        "train": "pretrain a base, or post-train it with SharpMoE",
        "submit": "submit a run to Slurm",
        "hostfile": "write the hostfile of a Slurm job for `deepspeed --hostfile`",
    },
    "results": {
        "sample": "draw images",
        "evaluate": "measure where models spend their experts, or judge samples",
        "report": "write a static HTML page of a run",
        "demo": "open a local page that draws images, saliency routers on and off",
        "ablate": "train, measure and compare the arms of a study",
    },
    "weights": {
        "identify": "report family, sizes and time convention of a published checkpoint",
        "convert": "convert published weights to weights of this project, or back",
        "export": "copy the weights of a checkpoint to one file",
        "diff": "compare two weights: parts, layers, experts that changed places",
    },
    "machine": {
        "gpu-check": "check everything on a GPU and measure it",
    },
}
_LAUNCHERS = {name: text for commands in _TASKS.values() for name, text in commands.items()}


def main(words: Sequence[str]) -> int:
    """Run the launcher that the first word names and return its exit code; 2 where no launcher has that name."""
    launcher = _launcher(words)
    return launcher if isinstance(launcher, int) else launcher(words[1:], f"sharpmoe {words[0]}")


def run() -> NoReturn:
    """Run with the words of this process and end it as the launcher ends itself."""
    words = sys.argv[1:]
    try:
        launcher = _launcher(words)
        sys.stdout.flush()
    except BrokenPipeError:  # `sharpmoe --help | head`
        leave_broken_pipe()
        launcher = BROKEN_PIPE
    if isinstance(launcher, int):
        sys.exit(launcher)
    launcher.leave(launcher(words[1:], f"sharpmoe {words[0]}"))


def _launcher(words: Sequence[str]) -> Command | int:
    """The launcher to run, or the exit code where help was printed or the name is wrong."""
    name = words[0] if words else ""
    if name in _LAUNCHERS:
        command: Command = importlib.import_module(f"launcher.{name.replace('-', '_')}").main
        return command
    if name == "--version":
        print(f"sharpmoe {sharpmoe.__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: sharpmoe COMMAND ...")
        for task, commands in _TASKS.items():
            print(f"\n{task}:", *(f"  {launcher:<11}{text}" for launcher, text in commands.items()), sep="\n")
        print("\n`sharpmoe COMMAND --help` lists the options.")
        return 0
    close = difflib.get_close_matches(name, _LAUNCHERS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(_LAUNCHERS)}"
    found = f"unknown command {name!r}" if words else "no command given"
    print(f"error: sharpmoe: {found}; {hint} (`sharpmoe --help` describes them)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
