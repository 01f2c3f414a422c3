"""Open a local page that draws images of a model: `python launcher/demo.py runs/quickstart [--port 7860]`.

Caption or class, seed, guidance and steps; saliency routers on and off from the same noise beside each other, with
what every denoising step spends on each token. Bound to 127.0.0.1; needs the extra `demo` and no network.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from functools import partial
from pathlib import Path

from launcher.bounds import Whole
from launcher.command import Command
from launcher.devices import placed, placement_arguments
from sharpmoe.config import SampleConfig
from sharpmoe.model.weights import load_model
from sharpmoe.report.demo import DemoModel, serve_page
from sharpmoe.report.runs import find_saved_model
from sharpmoe.report.samples import open_coders


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder, checkpoint folder or .safetensors file")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add(
        "--shards",
        help="prepared shards, for codec and text encoder (default: those of the run, else what the weights name)",
    )
    add("--port", type=Whole(1, 65535), help="port on this machine (default: the first free one from 7860)")
    placement_arguments(parser)


def _act(arguments: argparse.Namespace) -> None:
    serve_page(_opened(arguments), arguments.port, partial(print, flush=True))


def _opened(arguments: argparse.Namespace) -> DemoModel:
    saved = find_saved_model(arguments.model, arguments.weights)
    model, header = load_model(saved.weights)
    shards = open_coders(saved, model, header, arguments.shards)
    settings = saved.run.sample if saved.run else SampleConfig()
    return DemoModel(model=placed(model, arguments), shards=shards, settings=settings, name=saved.name)


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
