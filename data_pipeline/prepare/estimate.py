"""Estimate a preparation without doing it: counts, sizes, buckets, time and bytes."""

import math
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.prepare.buckets import Resolution, nearest_buckets
from data_pipeline.prepare.counts import Counts, no_held_out, reasons_of
from data_pipeline.prepare.encoding import BATCH, Encoded, Worker, decoded_batches, encode_batch, write_tar
from data_pipeline.prepare.plan import shard_plans
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.recipe import Recipe, check_recipe, saliency_lines
from data_pipeline.prepare.survey import Catalog
from data_pipeline.prepare.write import (
    Machine,
    bucket_report,
    check_catalog,
    list_source,
    new_codec,
    recipe_resolutions,
    training_images,
    worker_of,
)
from data_pipeline.sources.images import UNREADABLE, upright_size
from data_pipeline.sources.items import ImageSource, Skipped, source_identity
from sharpmoe.errors import DataError

_SIZES_READ = 1000  # images whose size is read where there are no buckets
_TRIED = 3 * BATCH  # images that are encoded for the estimate
_FITTED = 256  # images that the codec of the estimate is fitted to


class _Trial(NamedTuple):
    """Measurements of encoding a few images."""

    seconds: float  # per image, on one rank; without the first batch, which warms up
    size: float  # bytes per image in the tars
    text_length: int
    parts: dict[str, float]  # bytes per image by what they hold: texts, latents, the rest
    skipped: list[Skipped]
    counts: Counts


def dry_run(source: ImageSource, recipe: Recipe, machine: Machine) -> list[str]:
    """Return lines that say what `prepare_shards` would do; nothing stays on disk.

    Raises DataError as `prepare_shards` would, except that images that cannot be used are reported and not refused.
    """
    check_recipe(recipe)
    _, digests = source_identity(source, source.units())
    with tempfile.TemporaryDirectory() as folder:
        list_source(source, Path(folder), digests, recipe, Rank(), machine.threads)
        catalog = Catalog(Path(folder), digests, recipe.limit)
        if not len(catalog):
            raise DataError("the source holds no picture that can be used")
        images = islice(training_images(source, catalog, recipe, machine), _FITTED)
        codec = new_codec(recipe, images, machine.device)
        resolutions = recipe_resolutions(recipe, codec)
        chosen = nearest_buckets(catalog.pixels, resolutions)
        worker = worker_of(source, recipe, codec, machine)
        shards = len(shard_plans(catalog, resolutions, chosen, recipe.shard_samples))
        trial = _try(worker, catalog, chosen, resolutions, Path(folder))
        return [
            *_counts(catalog),
            *_sizes(source, catalog),
            *bucket_report(catalog, resolutions, chosen, recipe),
            *saliency_lines(recipe),
            *(f"tried: {line}" for line in trial.counts.lines(_targets(resolutions, chosen), recipe.fit)),
            *_estimate(trial, len(catalog), shards, machine.place.size, recipe.text_dtype),
            *_refusal(catalog, recipe),
        ]


def _targets(resolutions: list[Resolution], chosen: np.ndarray) -> list[tuple[int, int]]:
    """Return the resolutions that have images."""
    return [resolutions[number].image for number in np.unique(chosen)]


def _counts(catalog: Catalog) -> list[str]:
    counts = {name: int((catalog.split == code).sum()) for code, name in enumerate(catalog.split_names)}
    splits = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    reasons = reasons_of(catalog.left_out())
    left_out = [f"left out: {count} x {reason}" for reason, count in reasons.most_common(20)]
    bad = sum(1 for _ in catalog.bad())
    unused = [f"{bad} cannot be used"] if bad else []
    if catalog.total > len(catalog):
        unused.append(f"--limit leaves out {catalog.total - len(catalog)}")
    taken = "; ".join([f"{len(catalog)} of {catalog.total + bad} pictures: {splits}", *unused])
    return [taken, *no_held_out(name for name, count in counts.items() if count), *left_out]


def _refusal(catalog: Catalog, recipe: Recipe) -> list[str]:
    """Return a line where `prepare_shards` would not begin, for what the listing alone shows; else none."""
    try:
        check_catalog(catalog, recipe)
    except DataError as error:
        return [f"without --dry-run this is refused: {error}"]
    return []


def _sizes(source: ImageSource, catalog: Catalog) -> list[str]:
    """Return the smallest, median and largest sides and files."""
    pixels = catalog.pixels
    shown = "all"
    if not pixels.any():
        pixels = np.array(list(_read_sizes(source, catalog)), dtype=np.int64).reshape(-1, 2)
        shown = f"{len(pixels)} read"
    if not len(pixels):
        return ["pictures: none of those tried can be read"]
    sides = [f"{name} {_range(values)} pixels" for name, values in (("height", pixels[:, 0]), ("width", pixels[:, 1]))]
    total = f"{catalog.bytes.sum() / 1e9:.3g} GB in all"
    return [f"pictures ({shown}): {', '.join(sides)}; files {_range(catalog.bytes)} bytes, {total}"]


def _read_sizes(source: ImageSource, catalog: Catalog) -> Iterator[tuple[int, int]]:
    for item in catalog.items(np.arange(min(_SIZES_READ, len(catalog)))):
        try:
            yield upright_size(source.read(item))
        except UNREADABLE:
            continue


def _range(values: np.ndarray) -> str:
    low, middle, high = (int(value) for value in np.quantile(values, (0.0, 0.5, 1.0)))
    return f"{low} .. {middle} .. {high}"


def _try(worker: Worker, catalog: Catalog, chosen: np.ndarray, resolutions: list[Resolution], folder: Path) -> _Trial:
    """Encode a few images of every bucket, in proportion to its images; the largest bucket first."""
    samples: list[Encoded] = []
    skipped: list[Skipped] = []
    marks = [(time.perf_counter(), 0)]  # and samples so far
    counts = np.bincount(chosen, minlength=len(resolutions))
    for number in np.argsort(-counts, kind="stable"):
        rows = np.flatnonzero(chosen == number)[: math.ceil(_TRIED * counts[number] / len(chosen))]
        for batch in decoded_batches(worker, catalog.items(rows), resolutions[number].image):
            skipped += batch.skipped
            if batch.items:
                for sample in encode_batch(worker, resolutions[number], batch):
                    if isinstance(sample, Skipped):
                        skipped.append(sample)
                    else:
                        samples.append(sample)
                marks.append((time.perf_counter(), len(samples)))
    if not samples:
        raise DataError(f"none of {len(skipped)} pictures can be used ({skipped[0].name}: {skipped[0].reason})")
    _, longest = write_tar(folder / "trial.tar", samples)
    size = (folder / "trial.tar").stat().st_size / len(samples)
    begin, before = marks[1 if len(marks) > 2 else 0]  # the first batch warms up
    seconds = (marks[-1][0] - begin) / (len(samples) - before)
    done = sum((sample.counts for sample in samples), Counts())
    return _Trial(
        seconds=seconds,
        size=size,
        text_length=longest,
        parts=_bytes_by_content(samples, size),
        skipped=skipped,
        counts=done,
    )


def _bytes_by_content(samples: list[Encoded], size: float) -> dict[str, float]:
    """Return the bytes per image of token states, of latents and of all else, which add up to `size`."""
    found = {"token states": "text", "latents": "latent"}
    parts = {
        what: sum(len(content) for sample in samples for name, content in sample.members.items() if _is(name, stem))
        / len(samples)
        for what, stem in found.items()
    }
    return {**parts, "other": size - sum(parts.values())}


def _is(name: str, stem: str) -> bool:
    return name.endswith(".npy") and name.startswith(stem)


def _estimate(trial: _Trial, count: int, shards: int, ranks: int, text_dtype: str) -> list[str]:
    hours, minutes = divmod(round(trial.seconds * count / ranks / 60), 60)
    on = f" on each of {ranks} ranks" if ranks > 1 else ""
    unreadable = [f"tried and left out: {entry.name}: {entry.reason}" for entry in trial.skipped[:20]]
    return [
        *unreadable,
        f"estimate: {shards} shards, {trial.size * count / 1e9:.3g} GB ({trial.size:.0f} bytes a picture, texts up to "
        f"{trial.text_length} tokens in {text_dtype})",
        f"estimate: of a picture {', '.join(f'{what} {size:.0f} bytes' for what, size in trial.parts.items())}",
        f"estimate: {hours} h {minutes:02d} min{on} ({trial.seconds * 1e3:.1f} ms a picture)",
    ]
