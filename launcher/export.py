"""Copy weights of a checkpoint to one file: `python launcher/export.py RUN OUT.safetensors [--weights ema|live]`."""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from pathlib import Path

import torch

from launcher.command import Command
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import read_weights, save_weights, stored_as
from sharpmoe.report.runs import check_overwrites_no_weights, find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder (its latest checkpoint), or one checkpoint folder")
    parser.add_argument("out", type=Path, help=".safetensors file to write; reading it needs no DeepSpeed")
    parser.add_argument("--weights", choices=("ema", "live"), default="ema", help="averaged (ema) or live weights")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the parameters"
    )


def _act(arguments: argparse.Namespace) -> None:
    source = find_saved_model(arguments.run, arguments.weights).weights
    check_overwrites_no_weights(arguments.out, source)
    state, config, meta = read_weights(source)
    with torch.device("meta"):
        model = build_model(config)
    save_weights(arguments.out, stored_as(state, model, getattr(torch, arguments.dtype)), config, meta)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {len(state)} tensors, {size:.1f} MB, from {source} (step {meta.get('step', 'unknown')})")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
