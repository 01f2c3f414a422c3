"""Compare two weights tensor by tensor: `python launcher/diff.py A B [--experts] [--json]`.

A and B are run folders, checkpoint folders, .safetensors files of this project, or folders of Nucleus-Image in the
layout of diffusers. Prints how far every part and every MoE layer moved, which experts of B continue which of A, also
where they have changed places, and which tensors only one of the two has.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
import json
from pathlib import Path

from launcher.command import Command
from sharpmoe.model.published.folder import PublishedFolder, is_published_folder
from sharpmoe.model.weights import WeightsFile
from sharpmoe.report.runs import find_saved_model
from sharpmoe.report.weights_difference import ComparedWeights, compare_weights
from sharpmoe.report.weights_difference_table import difference_json, difference_text


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A", help="run folder, checkpoint folder, .safetensors, or folder of Nucleus-Image")
    add("b", metavar="B", help="what is compared with it")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add("--experts", action="store_true", help="one more table: every expert, and the one of B that continues it")
    add("--json", action="store_true", help="print JSON, with every expert and every name")


def _act(arguments: argparse.Namespace) -> None:
    (a, first), (b, second) = (_open(Path(path), arguments.weights) for path in (arguments.a, arguments.b))
    found = compare_weights(a, b)
    if arguments.json:
        print(json.dumps(difference_json(found, (first, second)), indent=1))
    else:
        print(difference_text(found, (first, second), arguments.experts))


def _open(path: Path, kind: str) -> tuple[ComparedWeights, str]:
    """Return weights that are read tensor by tensor, and their name."""
    if is_published_folder(path):
        return PublishedFolder(path), str(path)
    saved = find_saved_model(path, "live" if kind == "live" else "ema")
    return WeightsFile(saved.weights), f"{path} ({saved.name})"


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
