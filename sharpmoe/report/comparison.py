"""Compare models on held-out images: allocation of each, and routing sheets on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.encode.like import origin_in
from data_pipeline.read.shards import ShardSet
from sharpmoe.config import DataConfig, ModelConfig
from sharpmoe.console import print_note
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES, Allocation, measure_allocation
from sharpmoe.evaluation.held_out import spread
from sharpmoe.evaluation.labels import check_labels
from sharpmoe.model.weights import load_model, read_architecture
from sharpmoe.report.compute_sheet import draw_compute_sheet
from sharpmoe.report.figures import allocation_curves, save_png
from sharpmoe.report.routing_sheet import RoutingSheet, draw_difference_sheet, draw_routing_sheet, observe_routing
from sharpmoe.report.runs import SavedModel
from sharpmoe.report.samples import check_shards, other_origin, slug
from sharpmoe.report.token_flops import TokenFlops, write_token_flops


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """How models are compared."""

    images: int = 128  # held-out images
    chunk: int = 16  # images per model call, which is the pool of DiffMoE
    sheet_images: int = 8  # images on a routing sheet; 0: no sheets
    sheet_blocks: tuple[int, ...] = ()  # blocks whose MoE layer gets a sheet of its own
    seed: int = 0  # of the noise
    with_markov_noise: bool = True  # also measure the flow loss with the noise of a Markov chain
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # of the parameters, in which the models compute


class Comparison(NamedTuple):
    """Measurements of several models, by name."""

    allocations: dict[str, Allocation]
    routing: dict[str, RoutingSheet]  # of models with MoE layers
    blocks: dict[int, dict[str, RoutingSheet]]  # of single MoE layers, by block
    flops: dict[str, TokenFlops]  # of models with MoE layers


def held_out_shards(models: Sequence[SavedModel], location: str | None = None, split: str | None = None) -> ShardSet:
    """Open held-out shards, by default those of the first model that belongs to a run. Raises DataError."""
    data = next((saved.run.data for saved in models if saved.run), DataConfig())
    return ShardSet.open(location or data.first_place, split or data.validation_split, data.remote.options())


def check_held_out(model: ModelConfig, shards: ShardSet, images: int, header: Mapping[str, str] | None = None) -> None:
    """Raise DataError where a model does not fit shards, or has no class for a label of the images to be measured.

    Those are `images`, spread over the split. header: see `check_shards`.
    """
    check_shards(model, shards, header)
    check_labels(model, shards, spread(shards.num_samples, images), is_trained=True)


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
    for saved in models:
        config = read_architecture(saved.weights)
        check_held_out(config, shards, settings.images)
        for block in settings.sheet_blocks:
            _layer_of(config, block)
    found = Comparison({}, {}, {block: {} for block in settings.sheet_blocks}, {})
    for name, saved in zip(names, models, strict=True):
        model, header = load_model(saved.weights)
        differs = other_origin(origin_in(header), shards)
        if differs is not None:
            print_note(
                f"warning: {name}: trained with {differs.what} {differs.key} {differs.here!r}, {shards.location} has "
                f"{differs.there!r}: what follows is not what it does on its own latents or texts"
            )
        layers = {block: _layer_of(model.config, block) for block in settings.sheet_blocks}
        model.to(settings.device, settings.dtype)
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
            codec, images = shards.codec_object(), settings.sheet_images
            found.routing[name] = observe_routing(model, shards, codec, images, settings.seed)
            tokens = math.prod(shards.grid)
            found.flops[name] = TokenFlops.of(model.config, tokens, shards.text_length)
            for block, sheets in found.blocks.items():
                sheets[name] = observe_routing(model, shards, codec, images, settings.seed, layers=layers[block])
    return found


def _layer_of(config: ModelConfig, block: int) -> slice:
    """Return the MoE layer of a block, in depth order. Raises ConfigError where it has none."""
    blocks = [number for number in range(config.depth) if config.is_moe(number)]
    if block not in blocks:
        raise ConfigError(f"--sheet-blocks: block {block} has no MoE layer, allowed: {' '.join(map(str, blocks))}")
    return slice(blocks.index(block), blocks.index(block) + 1)


def write_comparison(folder: Path | str, found: Comparison, scale: float | None = None) -> Path:
    """Write a JSON file and a routing sheet of each model, curves, and of several models their compute side by side.

    All routing sheets share one colour scale, up to `scale` (default: the largest count); two models also get a sheet
    of their difference. Sheets of single MoE layers have a scale per layer. Returns the folder.
    """
    folder = Path(folder)
    for name, result in found.allocations.items():
        result.save(folder / f"{slug(name)}.json")
    save_png(allocation_curves(found.allocations), folder / "allocation.png")
    _write_sheets(folder, found.routing, "", scale)
    for block, sheets in found.blocks.items():
        _write_sheets(folder, sheets, f"block {block}", None)
    for name, flops in found.flops.items():
        write_token_flops(folder, f"flops_{slug(name)}", flops, found.routing[name], name)
    if len(found.routing) > 1:
        save_png(draw_compute_sheet(found.routing), folder / "compute.png")
    return folder


def _write_sheets(folder: Path, sheets: Mapping[str, RoutingSheet], layer: str, scale: float | None) -> None:
    """Write the routing sheets of one layer, or of all ("") together, on one scale, and the difference of two."""
    most = scale or max((float(sheet.experts.max()) for sheet in sheets.values()), default=None)
    ending, of = (f"_{layer.replace(' ', '')}", f", {layer}") if layer else ("", "")
    label = f"experts per token, {layer or 'all MoE layers'}"
    for name, sheet in sheets.items():
        save_png(draw_routing_sheet(sheet, f"{name}{of}", most, label), folder / f"routing_{slug(name)}{ending}.png")
    if len(sheets) == 2:
        (first, before), (second, after) = sheets.items()
        pixels = draw_difference_sheet(before, after, f"{second} minus {first}{of}")
        save_png(pixels, folder / f"routing_difference{ending}.png")
