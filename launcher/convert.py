"""Published weights to ours and back.

`python launcher/convert.py checkpoint.pth OUT.safetensors --family promoe --router ec` writes a file that a run file
can start from (checkpoint.init); `python launcher/convert.py OURS.safetensors OUT.safetensors --to promoe` writes ours
under published key names.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from launcher.command import Command
from sharpmoe.model.attach import extend_to_text
from sharpmoe.model.published.load import read_pretrained
from sharpmoe.model.published.names import FAMILIES, NAMES, to_published
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.report.runs import find_saved_model


def _act(arguments: argparse.Namespace) -> None:
    print(_to_published(arguments) if arguments.to else _to_ours(arguments))


def _to_ours(arguments: argparse.Namespace) -> str:
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
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, arguments.out)
    return f"{arguments.out}: {len(state)} tensors under the names of {arguments.to}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, help="published .pth, .pt, .safetensors or folder; with --to a file or run of ours")
    add("out", type=Path, help="the .safetensors file to write")
    add("--family", choices=FAMILIES, default="promoe", help="family of the source (default: promoe)")
    add("--router", choices=sorted(NAMES), default="dense", help="router of the source (default: dense)")
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of a training checkpoint")
    add("--to", choices=FAMILIES, help="write weights of ours under the names of this family")
    add("--num-heads", type=int, help="where the width does not tell")
    add("--latent-size", type=int, help="where no positions are stored")
    add("--top-k", type=int, help="experts per token, where the family does not tell")
    add("--capacity", type=float, help="mean experts per token (default: 1)")
    add("--text-width", type=int, help="extend the class-conditional trunk to text states of this width")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
