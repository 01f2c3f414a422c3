"""Copy weights of a checkpoint to one file, or to a folder that diffusers loads.

`python launcher/export.py RUN OUT.safetensors [--weights ema|live]` writes a weights file of this project;
`python launcher/export.py RUN OUT/ --to diffusers` writes what `NucleusMoEImageTransformer2DModel.from_pretrained`
reads, with the saliency routers beside it.
"""

if not __package__:  # run as a script, which has this folder on its path
    import startup  # noqa: F401 - Ctrl-C or missing packages are one line

import argparse
from pathlib import Path

import torch

from launcher.command import Command
from sharpmoe.checkpoint.adapters import export_adapters
from sharpmoe.model.build import build_model
from sharpmoe.model.published.export import write_folder
from sharpmoe.model.weights import WeightsFile, read_weights, save_weights, stored_as
from sharpmoe.report.runs import check_overwrites_no_weights, find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, help="run folder (its latest checkpoint), or one checkpoint folder")
    add("out", type=Path, help=".safetensors file to write, whose reading needs no DeepSpeed; with --to a new folder")
    add("--weights", choices=("ema", "live"), default="ema", help="averaged (ema) or live weights")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters (default: float32; with --to that of converted weights)",
    )
    add(
        "--adapters",
        action="store_true",
        help="write the adapters of a LoRA run alone: OUT is a folder in peft's format; without it they are merged",
    )
    add("--to", choices=("diffusers",), help="write a folder in the layout of diffusers (backbone nucleus)")


def _act(arguments: argparse.Namespace) -> None:
    if arguments.adapters:
        count = export_adapters(
            find_saved_model(arguments.run, arguments.weights).weights.parent, arguments.out, arguments.weights
        )
        print(f"{arguments.out}: {count} adapted layers in peft's format, from {arguments.run} ({arguments.weights})")
        return
    source = find_saved_model(arguments.run, arguments.weights).weights
    check_overwrites_no_weights(arguments.out, source)
    if arguments.to is not None:
        print(_to_folder(arguments, WeightsFile(source)))
        return
    state, config, meta = read_weights(source)
    with torch.device("meta"):
        model = build_model(config)
    save_weights(arguments.out, stored_as(state, model, getattr(torch, arguments.dtype or "float32")), config, meta)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {len(state)} tensors, {size:.1f} MB, from {source} (step {meta.get('step', 'unknown')})")


def _to_folder(arguments: argparse.Namespace, weights: WeightsFile) -> str:
    dtype = getattr(torch, arguments.dtype or weights.meta.get("dtype", "float32"))
    files = write_folder(arguments.out, weights.config, weights.tensor, dtype, weights.meta)
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{arguments.out}: {len(files)} files, {size:.1f} MB, from {weights.path}"


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
