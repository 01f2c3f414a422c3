"""Measure where models spend their experts on held-out images: `python launcher/evaluate.py BEFORE [AFTER ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.read.shards import ShardSet
from launcher.command import Command
from sharpmoe.config import DataConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation import allocation
from sharpmoe.model.weights import load_model
from sharpmoe.report import samples, sheets
from sharpmoe.report.runs import Source, find_source


def _act(arguments: argparse.Namespace) -> None:
    sources = [find_source(path, arguments.weights) for path in arguments.models]
    data = next((source.run.data for source in sources if source.run), DataConfig())
    place, split = arguments.shards or data.first_place, arguments.split or data.validation_split
    shards = ShardSet.open(place, split, data.remote.options())
    results, routing = {}, {}
    for name, source in zip(_names(arguments, sources), sources, strict=True):
        model = samples.check_shards(load_model(source.weights)[0], shards).to(arguments.device)
        results[name] = allocation.measure(
            model, shards, images=arguments.images, seed=arguments.seed, chunk=arguments.chunk
        )
        if arguments.sheet_images and model.moe_layers():
            routing[name] = sheets.routing_sheet(
                model, shards, shards.codec_object(), arguments.sheet_images, arguments.seed
            )
    print(allocation.table(results))
    print(f"written: {sheets.write_evaluation(arguments.out, results, routing)}")


def _names(arguments: argparse.Namespace, sources: Sequence[Source]) -> list[str]:
    names = arguments.names or (["before", "after"] if len(sources) == 2 else [source.name for source in sources])
    if len(set(names)) != len(sources):
        raise ConfigError(f"--names: {len(sources)} models need as many different names, got {', '.join(names)}")
    return names


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", type=Path, help="run folder, checkpoint folder or .safetensors file")
    add("--names", nargs="+", default=None, help="column heads (default: before and after, or the models' names)")
    add("--weights", choices=("ema", "live"), default="ema", help="which weights of a run")
    add("--shards", default=None, help="prepared shards (default: those of the run)")
    add("--split", default=None, help="held-out split (default: that of the run)")
    add("--images", type=int, default=128, help="held-out images")
    add("--chunk", type=int, default=16, help="images per model call: the pool of DiffMoE")
    add("--sheet-images", type=int, default=8, help="images on the routing sheet; 0 draws none")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs")


main = Command(text=__doc__, arguments=_arguments, act=_act)

if __name__ == "__main__":
    main.run()
