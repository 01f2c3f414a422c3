"""What a preparation would do, without doing it: counts, sizes, buckets, time and bytes."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.encode.codecs import build_codec
from data_pipeline.encode.texts import build_text_encoder
from data_pipeline.prepare import buckets, encoding
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.encoding import BATCH, Encoded, Worker
from data_pipeline.prepare.plan import plans
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.recipe import Recipe, check
from data_pipeline.prepare.survey import Catalog, survey
from data_pipeline.prepare.tarring import write_tar
from data_pipeline.prepare.write import Means, describe, training_images
from data_pipeline.sources.images import UNREADABLE, upright_size
from data_pipeline.sources.items import Skipped, Source
from sharpmoe.errors import DataError

_LOOKED_AT = 1000  # pictures whose size is read where no buckets are asked for
_TRIED = 3 * BATCH  # pictures that are encoded for the estimate
_FITTED = 256  # pictures that the codec of the estimate is fitted on


class Trial(NamedTuple):
    """What encoding a few pictures has shown."""

    seconds: float  # per picture, on one rank; the first batch is left out, it warms up
    size: float  # bytes per picture in the tars
    text_length: int
    skipped: list[Skipped]


def dry_run(source: Source, recipe: Recipe, means: Means) -> list[str]:
    """Lines that say what `prepare` would do; nothing stays on disk.

    Raises DataError as `prepare` would, but pictures that cannot be used are told of and not refused.
    """
    check(recipe)
    digests = [unit.digest for unit in source.units()]
    with tempfile.TemporaryDirectory() as folder:
        survey(source, Path(folder), digests, Rank(), bool(recipe.buckets), means.threads)
        catalog = Catalog(Path(folder), digests, recipe.limit)
        if not len(catalog):
            raise DataError("the source holds no picture that can be used")
        images = islice(training_images(source, catalog, recipe, means), _FITTED)
        codec = build_codec(recipe.codec, images, means.device)
        resolutions = buckets.table(recipe.buckets, recipe.image_size, recipe.patch_size, codec.latent_shape)
        chosen = buckets.choose(catalog.pixels, resolutions)
        worker = Worker(source, recipe, codec, build_text_encoder(recipe.encoder, means.device), means.threads)
        shards = len(plans(catalog, resolutions, chosen, recipe.shard_samples))
        trial = _try(worker, catalog, chosen, resolutions, Path(folder))
        return [
            *_counts(catalog),
            *_sizes(source, catalog),
            *describe(catalog, resolutions, chosen),
            *_estimate(trial, len(catalog), shards, means.place.size),
        ]


def _counts(catalog: Catalog) -> list[str]:
    counts = {name: int((catalog.split == code).sum()) for code, name in enumerate(catalog.split_names)}
    splits = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    reasons = Counter(entry.reason.replace(Path(entry.name).stem, "NAME") for entry in catalog.left_out())
    left_out = [f"left out: {count} x {reason}" for reason, count in reasons.most_common(20)]
    return [f"{len(catalog)} of {catalog.total} pictures: {splits}", *left_out]


def _sizes(source: Source, catalog: Catalog) -> list[str]:
    """Smallest, middle and largest sides and files."""
    pixels = catalog.pixels
    shown = "all"
    if not pixels.any():
        pixels = np.array(list(_looked_at(source, catalog)), dtype=np.int64).reshape(-1, 2)
        shown = f"{len(pixels)} looked at"
    if not len(pixels):
        return ["pictures: none of those looked at can be read"]
    sides = [f"{name} {_range(values)} pixels" for name, values in (("height", pixels[:, 0]), ("width", pixels[:, 1]))]
    total = f"{catalog.bytes.sum() / 1e9:.3g} GB in all"
    return [f"pictures ({shown}): {', '.join(sides)}; files {_range(catalog.bytes)} bytes, {total}"]


def _looked_at(source: Source, catalog: Catalog) -> Iterator[tuple[int, int]]:
    for item in catalog.items(np.arange(min(_LOOKED_AT, len(catalog)))):
        try:
            yield upright_size(source.read(item))
        except UNREADABLE:
            continue


def _range(values: np.ndarray) -> str:
    low, middle, high = (int(value) for value in np.quantile(values, (0.0, 0.5, 1.0)))
    return f"{low} .. {middle} .. {high}"


def _try(worker: Worker, catalog: Catalog, chosen: np.ndarray, resolutions: list[Resolution], folder: Path) -> Trial:
    """Encode a few pictures of the largest bucket."""
    largest = int(np.bincount(chosen).argmax())
    items = catalog.items(np.flatnonzero(chosen == largest)[:_TRIED])
    samples: list[Encoded] = []
    skipped: list[Skipped] = []
    marks = [time.perf_counter()]
    for chunk in encoding.chunks(worker, items, resolutions[largest].image):
        skipped += chunk.skipped
        if chunk.items:
            samples += encoding.encode(worker, resolutions[largest], chunk)
            marks.append(time.perf_counter())
    if not samples:
        raise DataError(f"none of {len(items)} pictures can be used ({skipped[0].name}: {skipped[0].reason})")
    _, longest = write_tar(folder / "trial.tar", samples)
    size = (folder / "trial.tar").stat().st_size / len(samples)
    warm = len(samples) > BATCH
    seconds = (marks[-1] - marks[1 if warm else 0]) / (len(samples) - (BATCH if warm else 0))
    return Trial(seconds, size, longest, skipped)


def _estimate(trial: Trial, count: int, shards: int, ranks: int) -> list[str]:
    hours, minutes = divmod(round(trial.seconds * count / ranks / 60), 60)
    on = f" on each of {ranks} ranks" if ranks > 1 else ""
    unreadable = [f"tried and left out: {entry.name}: {entry.reason}" for entry in trial.skipped[:20]]
    return [
        *unreadable,
        f"estimate: {shards} shards, {trial.size * count / 1e9:.3g} GB ({trial.size:.0f} bytes a picture, texts up to "
        f"{trial.text_length} tokens)",
        f"estimate: {hours} h {minutes:02d} min{on} ({trial.seconds * 1e3:.1f} ms a picture)",
    ]
