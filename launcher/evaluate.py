"""Measure where models spend their experts on held-out images: `python launcher/evaluate.py BEFORE [AFTER ...]`."""

import argparse
from pathlib import Path

from launcher.bounds import NOT_NEGATIVE, POSITIVE, SEED
from launcher.command import Command
from launcher.devices import DEVICE_HELP, device_name
from sharpmoe.console import print_note
from sharpmoe.durable import check_folder
from sharpmoe.evaluation.allocation import allocation_table
from sharpmoe.report.comparison import ComparisonSettings, compare_models, held_out_shards, write_comparison
from sharpmoe.report.runs import average_note, find_saved_model


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", type=Path, help="run folder, checkpoint folder or .safetensors file")
    add("--names", nargs="+", help="column headings (default: before and after, or the models' names)")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add("--shards", help="prepared shards (default: those of the run)")
    add("--split", help="held-out split (default: that of the run)")
    add("--images", type=POSITIVE, default=128, help="held-out images")
    add("--chunk", type=POSITIVE, default=16, help="images per model call: the pool of DiffMoE")
    add("--sheet-images", type=NOT_NEGATIVE, default=8, help="images on a routing sheet; 0 draws none")
    add("--seed", type=SEED, default=0, help="seed of the noise")
    add("--out", type=Path, default=Path("evaluation"), help="folder for the results")
    add("--device", type=device_name, default="auto", help=f"device of the model: {DEVICE_HELP}")


def _act(arguments: argparse.Namespace) -> None:
    models = [find_saved_model(path, arguments.weights) for path in arguments.models]
    shards = held_out_shards(models, arguments.shards, arguments.split)
    settings = ComparisonSettings(
        images=arguments.images,
        chunk=arguments.chunk,
        sheet_images=arguments.sheet_images,
        seed=arguments.seed,
        device=arguments.device,
    )
    check_folder(arguments.out)
    found = compare_models(models, arguments.names, shards, settings)
    print(allocation_table(found.allocations))
    for saved in models:
        print_note(average_note(saved))
    print(f"written: {write_comparison(arguments.out, found)}")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
