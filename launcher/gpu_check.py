"""Check everything on a GPU and measure it: `python launcher/gpu_check.py [--out gpu-check]`, in under eight minutes.

Environment, tests that need a device, 20 steps and their resume, a profile of a step, benchmarks at sizes that fit the
device. Every part has a limit of its own. What is known is in the folder as soon as it is known: JSON lines per part,
and `table.md`, fit for docs/performance.md. With --device cpu the same runs at the smallest sizes, to see that it runs.
Exit code 1 where a part failed or had no time.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from pathlib import Path

from benchmarks.gpu_check.conduct import PARTS, Asked, conduct
from launcher.bounds import POSITIVE_REAL
from launcher.command import Command
from launcher.devices import device_name
from sharpmoe.console import print_note


def _device_kind(text: str) -> str:
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, allowed: auto, cpu or cuda; of several GPUs CUDA_VISIBLE_DEVICES chooses one"
        )
    return device_name(text)


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-check"), help="folder of the results, absent or empty")
    parts = f"of {', '.join(PARTS)} (default: all)"
    add("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART", help=parts)
    add("--device", type=_device_kind, default="auto", help="auto (cuda where there is one, else cpu), cpu or cuda")
    add("--seconds", type=POSITIVE_REAL, default=470.0, help="limit of all parts together, in seconds")


def _act(arguments: argparse.Namespace) -> int:
    parts = tuple(part for part in PARTS if part in arguments.parts)
    asked = Asked(out=arguments.out.resolve(), device=arguments.device, parts=parts, seconds=arguments.seconds)
    return conduct(asked, print_note)


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
