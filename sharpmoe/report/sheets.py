"""The routing sheet of a model: where its experts go, step by step, on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.encode.codecs import Codec
from data_pipeline.read.shards import ShardSet
from sharpmoe.evaluation import allocation
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES, Allocation
from sharpmoe.evaluation.held_out import ALONE, Share, observe, spread
from sharpmoe.model.dit import DiT
from sharpmoe.report import figures
from sharpmoe.report.figures import Sheet
from sharpmoe.report.samples import slug


def routing_sheet(
    model: DiT, shards: ShardSet, codec: Codec, images: int = 8, seed: int = 0, share: Share = ALONE
) -> Sheet:
    """Roll the model out over `images` held-out samples, spread over the main bucket, and keep what a sheet shows.

    Eval mode, fixed noise, one call per time for all images; communicates by `share.reduce` alone.
    """
    rows = shards.indices_of(shards.main_bucket)
    indices = [rows[i] for i in spread(len(rows), images)]
    seen = observe(model, shards, indices, ALLOCATION_TIMES, seed=seed, chunk=images, share=share)
    batch = shards.batch(indices)
    decoded = codec.decode(batch.latent)
    return Sheet(decoded, seen.saliency, seen.foreground, seen.experts, ALLOCATION_TIMES, batch.captions)


def write_evaluation(folder: Path | str, results: Mapping[str, Allocation], routing: Mapping[str, Sheet]) -> Path:
    """Write JSON per model, the curves, and routing sheets on one colour scale; returns the folder."""
    folder = Path(folder)
    for name, result in results.items():
        allocation.save(result, folder / f"{slug(name)}.json")
    figures.save(figures.allocation_curves(results), folder / "allocation.png")
    most = max((float(sheet.experts.max()) for sheet in routing.values()), default=None)
    for name, sheet in routing.items():
        figures.save(figures.routing_sheet(sheet, name, most), folder / f"routing_{slug(name)}.png")
    return folder
