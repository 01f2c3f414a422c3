"""Tell what a published checkpoint is: `python launcher/identify.py FILE [--shards data/fluent64] [--family promoe]`.

Prints the families whose key names it has and its sizes; with shards also its held-out loss under every known time
convention, so that a wrong one is seen. Exit code 1 where the named family, or every convention, is wrong.
"""

import argparse
import sys
from pathlib import Path

from data_pipeline.read.shards import ShardSet
from launcher.command import Command
from sharpmoe.evaluation import identify
from sharpmoe.model.published.names import FAMILIES
from sharpmoe.model.published.read import read_state


def _act(arguments: argparse.Namespace) -> int:
    shards = None if arguments.shards is None else ShardSet.open(arguments.shards, arguments.split)
    given = {name: getattr(arguments, name) for name in ("num_heads", "latent_size", "top_k")}
    found = identify.inspect(read_state(arguments.file, arguments.weights), shards, arguments.images, given)
    print(identify.text(found))
    wrong = identify.verdict(found, arguments.family)
    if wrong is not None:
        print(f"warning: {arguments.file}: {wrong}", file=sys.stderr)
    return 0 if wrong is None else 1


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help=".pth, .pt or .safetensors file, or a folder of shards of a checkpoint")
    add("--family", choices=FAMILIES, help="check that it is of this family")
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of a training checkpoint")
    add("--shards", help="prepared data whose latents the checkpoint was trained on")
    add("--split", default="unseen", help="held-out split (default: unseen)")
    add("--images", type=int, default=64, help="held-out images (default: 64)")
    add("--num-heads", type=int, help="where the width does not tell")
    add("--latent-size", type=int, help="where no positions are stored")
    add("--top-k", type=int, help="experts per token, where the family does not tell")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
