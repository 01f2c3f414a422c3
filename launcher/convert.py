"""Convert published weights to a weights file of this project, and back.

`python launcher/convert.py checkpoint.pth OUT.safetensors --family promoe --router ec` writes a file that a run can
start from (checkpoint.init); `python launcher/convert.py OURS.safetensors OUT.safetensors --to promoe` writes weights
of this project under published key names.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from launcher.bounds import POSITIVE, POSITIVE_REAL
from launcher.command import Command
from sharpmoe.durable import write_atomically
from sharpmoe.model.attach import extend_to_text
from sharpmoe.model.published.load import read_pretrained
from sharpmoe.model.published.names import CHECKPOINT_FAMILIES, NAMES, to_published
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.report.runs import find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="published .pth, .pt, .safetensors or folder; with --to a weights file or run folder of this project",
    )
    add("out", type=Path, help=".safetensors file to write")
    add("--family", choices=CHECKPOINT_FAMILIES, default="promoe", help="family of the source")
    add("--router", choices=sorted(NAMES), default="dense", help="router of the source")
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of a training checkpoint")
    add("--to", choices=CHECKPOINT_FAMILIES, help="write weights of this project under the key names of this family")
    add("--num-heads", type=POSITIVE, help="for a width that does not determine it")
    add("--latent-size", type=POSITIVE, help="for a checkpoint without stored positions")
    add("--top-k", type=POSITIVE, help="experts per token, for a family that does not determine it")
    add("--capacity", type=POSITIVE_REAL, help="mean experts per token (default: 1)")
    add("--text-width", type=POSITIVE, help="extend a class-conditional model to text states of this width")


def _act(arguments: argparse.Namespace) -> None:
    print(_to_published(arguments) if arguments.to else _from_published(arguments))


def _from_published(arguments: argparse.Namespace) -> str:
    sizes = {name: getattr(arguments, name) for name in ("num_heads", "latent_size", "top_k", "capacity")}
    model, report = read_pretrained(
        arguments.source, arguments.family, arguments.router, weights=arguments.weights, **sizes
    )
    if arguments.text_width:
        model = extend_to_text(model, arguments.text_width, arguments.text_width)
    meta = {"published": f"{arguments.family}/{arguments.router}, {arguments.weights}"}
    save_weights(arguments.out, model.state_dict(), model.config, meta)
    return f"{arguments.out}: {report.line()}"


def _to_published(arguments: argparse.Namespace) -> str:
    model, _ = load_model(find_saved_model(arguments.source).weights)
    state = to_published(model.state_dict(), model.config, arguments.to)
    contiguous = {key: value.contiguous() for key, value in state.items()}
    write_atomically(arguments.out, lambda draft: save_file(contiguous, draft))
    return f"{arguments.out}: {len(state)} tensors under the names of {arguments.to}"


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
