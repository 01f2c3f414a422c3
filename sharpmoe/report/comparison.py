"""Compare models on held-out images: allocation of each, and routing sheets on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.encode.like import origin_in
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import DataConfig
from sharpmoe.console import print_note
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES, Allocation, measure_allocation
from sharpmoe.model.weights import load_model
from sharpmoe.report.compute_sheet import draw_compute_sheet
from sharpmoe.report.figures import allocation_curves, save_png
from sharpmoe.report.routing_sheet import RoutingSheet, draw_difference_sheet, draw_routing_sheet, observe_routing
from sharpmoe.report.runs import SavedModel
from sharpmoe.report.samples import check_shards, other_origin, slug


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """How models are compared."""

    images: int = 128  # held-out images
    chunk: int = 16  # images per model call, which is the pool of DiffMoE
    sheet_images: int = 8  # images on a routing sheet; 0: no sheets
    seed: int = 0  # of the noise
    with_markov_noise: bool = True  # also measure the flow loss with the noise of a Markov chain
    device: torch.device | str = "cpu"


class Comparison(NamedTuple):
    """Measurements of several models, by name."""

    allocations: dict[str, Allocation]
    routing: dict[str, RoutingSheet]  # of models with MoE layers


def held_out_shards(models: Sequence[SavedModel], location: str | None = None, split: str | None = None) -> ShardSet:
    """Open held-out shards, by default those of the first model that belongs to a run. Raises DataError."""
    data = next((saved.run.data for saved in models if saved.run), DataConfig())
    return ShardSet.open(location or data.first_place, split or data.validation_split, data.remote.options())


def compare_models(
    models: Sequence[SavedModel], names: Sequence[str] | None, shards: ShardSet, settings: ComparisonSettings
) -> Comparison:
    """Measure each model on the same held-out samples; stderr says which is measured and how far it is.

    Names are those given, before and after for two models, or those of the models. Raises ConfigError where they are
    not distinct, DataError where a model does not fit the shards.
    """
    names = names or (["before", "after"] if len(models) == 2 else [saved.name for saved in models])
    if len(set(names)) != len(models):
        raise ConfigError(f"--names: {len(models)} models need as many different names, got {', '.join(names)}")
    found = Comparison({}, {})
    for name, saved in zip(names, models, strict=True):
        model, header = load_model(saved.weights)
        check_shards(model, shards)
        differs = other_origin(origin_in(header), shards)
        if differs is not None:
            print_note(
                f"warning: {name}: trained with {differs.what} {differs.key} {differs.here!r}, {shards.location} has "
                f"{differs.there!r}: what follows is not what it does on its own latents or texts"
            )
        model.to(settings.device)
        images = min(settings.images, shards.num_samples)
        twice = ", with fixed and with Markov noise" if settings.with_markov_noise else ""
        print_note(f"measuring {name}: {images} images, {len(ALLOCATION_TIMES)} times{twice}")
        found.allocations[name] = measure_allocation(
            model,
            shards,
            images=settings.images,
            seed=settings.seed,
            chunk=settings.chunk,
            with_markov_noise=settings.with_markov_noise,
        )
        if settings.sheet_images and model.moe_layers():
            found.routing[name] = observe_routing(
                model, shards, shards.codec_object(), settings.sheet_images, settings.seed
            )
    return found


def write_comparison(folder: Path | str, found: Comparison) -> Path:
    """Write a JSON file and a routing sheet of each model, curves, and of several models their compute side by side.

    All routing sheets share one colour scale; two models also get a sheet of their difference. Returns the folder.
    """
    folder = Path(folder)
    for name, result in found.allocations.items():
        result.save(folder / f"{slug(name)}.json")
    save_png(allocation_curves(found.allocations), folder / "allocation.png")
    most = max((float(sheet.experts.max()) for sheet in found.routing.values()), default=None)
    for name, sheet in found.routing.items():
        save_png(draw_routing_sheet(sheet, name, most), folder / f"routing_{slug(name)}.png")
    if len(found.routing) > 1:
        save_png(draw_compute_sheet(found.routing), folder / "compute.png")
    if len(found.routing) == 2:
        (first, before), (second, after) = found.routing.items()
        pixels = draw_difference_sheet(before, after, f"{second} minus {first}")
        save_png(pixels, folder / "routing_difference.png")
    return folder
