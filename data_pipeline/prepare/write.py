"""Write images and captions as a folder of shards, by one process or by many.

    recipe.json          the request; compared before anything is added
    codec.safetensors    the codec, with its fitted arrays
    SHARD.tar            WebDataset shard; SHARD is SPLIT-00000, or SPLIT-BUCKET-00000 where there are several buckets
    SHARD.json           its table; exists only when the tar is complete
    empty_text.npz       the embedding of the empty caption
    skipped.jsonl        what was left out, and why; exists only if something was
    index.json           written last
    .work                listings of the source; removed at the end

Every file appears under its final name only when it is complete, and the same pictures give the same bytes: a killed
run leaves nothing partly written, and the next one writes what is missing. Ranks share only these files: every
shard belongs to one rank by the hash of its contents, and the rank that finishes last writes the index.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.build import (
    CODEC_FILE,
    build_codec,
    build_text_encoder,
    codec_bytes,
    codec_of,
    load_codec,
    parse_codec,
    restore_text_encoder,
)
from data_pipeline.encode.codecs import Codec
from data_pipeline.encode.like import is_fitted
from data_pipeline.encode.saliency import MapContext
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.index import INDEX_FILE, ShardTable, table_bytes
from data_pipeline.members import encode_json
from data_pipeline.prepare.buckets import Resolution, bucket_lines, bucket_resolutions, nearest_buckets
from data_pipeline.prepare.counts import Counts, write_counts
from data_pipeline.prepare.destination import Publish, publish_nothing
from data_pipeline.prepare.encoding import (
    Encoded,
    Worker,
    decoded_batches,
    decoded_pictures,
    encode_batch,
    write_tar,
)
from data_pipeline.prepare.finish import (
    WORK_FOLDER,
    Summary,
    complete_index,
    counts_file,
    index_files,
    refuse_bad_share,
    remove_work_files,
    summary_of,
    table_of,
    write_index,
)
from data_pipeline.prepare.plan import ShardPlan, plans_of_rank, shard_plans
from data_pipeline.prepare.ranks import Rank, heartbeat, lock, pulse, wait
from data_pipeline.prepare.recipe import RECIPE_FILE, Recipe, check_recipe, content_request, refuse_mixing
from data_pipeline.prepare.survey import Catalog, refuse_missing, survey
from data_pipeline.sources.animations import frames_of
from data_pipeline.sources.images import Picture
from data_pipeline.sources.items import ImageSource, Skipped, hash_text, source_identity
from sharpmoe.console import progress_bar
from sharpmoe.durable import publish_once, remove_drafts, sha256_of, write_atomically
from sharpmoe.errors import DataError

_FIT_IMAGES = 20_000  # enough for the covariance of a patch; more only takes time


class Machine(NamedTuple):
    """What a preparation runs on; nothing here changes what it writes."""

    device: str = "cpu"  # of the autoencoder and the text encoder
    threads: int = 1  # that decode images
    place: Rank = Rank()
    progress: bool = True
    say: Callable[[str], object] = lambda line: None  # receives lines about the source


_PLAIN = Machine()


def prepare_shards(
    source: ImageSource,
    folder: Path,
    recipe: Recipe,
    machine: Machine = _PLAIN,
    publish: Publish = publish_nothing,
) -> Summary:
    """Write `source` as shards into `folder`, or finish what an earlier call began; a complete folder is left alone.

    With several ranks every rank calls this with its own place; a rank that finishes before the others returns a
    summary with `complete` false. Ranks communicate by files only. `publish` receives every file when it is complete,
    the index last.

    Raises DataError where the folder was begun with another recipe, where too many images are unusable, or where a
    latent is not finite.
    """
    check_recipe(recipe)
    with lock(folder, shared=machine.place.size > 1):  # before the source is read, which may take long
        identity, digests = source_identity(source, source.units())
        asked = content_request(identity, recipe)
        _refuse_other_request(folder, asked)
        index = complete_index(folder)
        if index is not None:
            remove_work_files(folder)  # a run may have been killed right after its index
            return summary_of(folder, index, worked=False, recipe=recipe)
        work = folder / WORK_FOLDER / hash_text(json.dumps(asked))[:16]
        try:
            with heartbeat(work, machine.place):
                return _work(source, folder, recipe, machine, work=work, digests=digests, asked=asked, publish=publish)
        except FileNotFoundError:  # another rank has finished everything and removed our listings
            index = complete_index(folder)
            if index is None:
                raise
            return summary_of(folder, index, worked=False, recipe=recipe)


def _refuse_other_request(folder: Path, asked: dict[str, Any]) -> None:
    """Compare with the recipe of an earlier call, which was written before anything else.

    The folder is listed before the recipe is read, because another rank may write at any time: a preparation writes its
    recipe first, so the recipe of every file in the listing is found.

    Raises DataError where they differ, or where a folder without a recipe holds anything but hidden files.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    begun = _read_json(folder / RECIPE_FILE)
    if begun is not None:
        refuse_mixing(folder, begun["request"], asked)
    elif any(name.endswith(".tar") or name == INDEX_FILE for name in names):
        raise DataError(f"{folder}: holds shards but no {RECIPE_FILE}; choose another --out, or delete the folder")
    elif names:
        raise DataError(f"{folder}: holds other files ({names[0]!r}), no place for shards; choose another --out")


def _work(
    source: ImageSource,
    folder: Path,
    recipe: Recipe,
    machine: Machine,
    *,
    work: Path,
    digests: list[str],
    asked: dict[str, Any],
    publish: Publish,
) -> Summary:
    """Survey the source, write this rank's shards and, where all shards are complete, the index."""
    if machine.place.size == 1:
        remove_drafts(folder)
    list_source(source, work, digests, recipe, machine.place, machine.threads)
    catalog = Catalog(work, digests, recipe.limit)
    check_catalog(catalog, recipe)
    images = partial(training_images, source, catalog, recipe, machine)
    codec = _codec(folder, work, recipe, machine, images)
    resolutions = recipe_resolutions(recipe, codec)
    worker = worker_of(source, recipe, codec, machine)
    _record_recipe(folder, worker, asked)
    for name in (RECIPE_FILE, CODEC_FILE):
        publish(folder / name)
    chosen = nearest_buckets(catalog.pixels, resolutions)
    for line in bucket_report(catalog, resolutions, chosen, recipe):
        machine.say(line)
    every = shard_plans(catalog, resolutions, chosen, recipe.shard_samples)
    mine = plans_of_rank(every, machine.place)
    _write_shards(folder, work, worker, catalog, mine, progress=machine.progress, publish=publish)
    if any(table_of(folder, plan.name) is None for plan in every):
        return Summary(folder=folder, complete=False)
    index = write_index(folder, work, worker, catalog, source=asked["source"], every=every, resolutions=resolutions)
    for path in index_files(folder):
        publish(path)
    return summary_of(folder, index, worked=True, recipe=recipe)


def list_source(source: ImageSource, work: Path, digests: list[str], recipe: Recipe, place: Rank, threads: int) -> None:
    """List the images of a source into `work`, with all that a recipe needs to know of them (see survey)."""
    survey(
        source,
        work,
        digests,
        place,
        read_sizes=bool(recipe.buckets),
        threads=threads,
        need_maps=recipe.saliency.needs_maps,
    )


def check_catalog(catalog: Catalog, recipe: Recipe) -> None:
    """Raise a DataError where images are missing, too many are unusable, or none is left."""
    refuse_missing(catalog, recipe.allow_missing)
    bad = list(catalog.bad())
    refuse_bad_share(bad, len(bad), catalog.total + len(bad), recipe.max_bad_share)
    if not len(catalog):
        raise DataError("the source holds no picture that can be used")


def recipe_resolutions(recipe: Recipe, codec: Codec) -> list[Resolution]:
    """Return the buckets of a recipe, with its frames.

    Raises DataError where the codec or the patch size does not divide a side.
    """
    still = bucket_resolutions(
        recipe.buckets, recipe.image_size, recipe.patch_size, codec.latent_shape, recipe.bucket_step
    )
    return [resolution.with_frames(recipe.frames) for resolution in still]


def bucket_report(catalog: Catalog, resolutions: list[Resolution], chosen: np.ndarray, recipe: Recipe) -> list[str]:
    """Return lines that say what the buckets hold."""
    train = np.zeros(len(catalog), bool)
    if "train" in catalog.split_names:
        train = catalog.split == catalog.split_names.index("train")
    meant = f"buckets of {recipe.buckets} tokens each; for a side of {recipe.buckets} pixels add --bucket-step 64"
    note = [meant] if recipe.buckets.isdigit() and recipe.bucket_step is None else []
    return note + bucket_lines(resolutions, chosen, catalog.pixels, train, recipe.fit)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read an object; None where the file does not exist. Raises DataError where it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path}: damaged; delete it and prepare again") from None
    return content


# --- codec and recipe -------------------------------------------------------------------------------------------------


def _codec(folder: Path, work: Path, recipe: Recipe, machine: Machine, images: Callable[[], Iterator[Tensor]]) -> Codec:
    """Return the folder's codec, or a new one: one that is fitted is fitted by the first rank for all.

    Raises DataError where that rank is dead: another fit would be another basis.
    """
    if (folder / RECIPE_FILE).exists() and (folder / CODEC_FILE).exists():
        return load_codec(folder, machine.device)
    fitted = work / CODEC_FILE
    to_fit = is_fitted(recipe.codec) and recipe.given_codec is None
    if to_fit and machine.place.rank and not wait(lambda: not fitted.exists() and (pulse(work, 0),)):
        raise DataError(
            f"{folder}: rank 0, which fits the codec for all {machine.place.size} ranks, gives no sign of life; run "
            "the same command again on all ranks, or use --codec-from"
        )
    if not fitted.exists():
        publish_once(fitted, codec_bytes(new_codec(recipe, images(), machine.device)))
    return load_codec(work, machine.device)


def new_codec(recipe: Recipe, images: Iterable[Tensor], device: str) -> Codec:
    """Return the codec that a recipe names: the given one, or one that may be fitted to the images."""
    if recipe.given_codec is None:
        return build_codec(recipe.codec, images, device)
    return codec_of(*parse_codec(recipe.given_codec, "the given codec"), device)


def worker_of(source: ImageSource, recipe: Recipe, codec: Codec, machine: Machine) -> Worker:
    """Return what encodes the images of a recipe. Raises DataError where encoder or saliency model cannot be used."""
    encoder = _text_encoder(recipe, machine.device)
    context = MapContext(codec, encoder, recipe.patch_size, machine.device)
    make_maps = recipe.saliency.kind.create(recipe.saliency, context)
    return Worker(
        source=source, recipe=recipe, codec=codec, encoder=encoder, make_maps=make_maps, threads=machine.threads
    )


def _text_encoder(recipe: Recipe, device: str) -> TextEncoder:
    """Return the encoder that a recipe names. Raises DataError where it has other weights than the recipe says."""
    parts = recipe.encoder.get("encoders", [recipe.encoder])
    restored = any("sha256" in part for part in parts)  # taken over from shards or weights
    return restore_text_encoder(recipe.encoder, device) if restored else build_text_encoder(recipe.encoder, device)


def training_images(source: ImageSource, catalog: Catalog, recipe: Recipe, machine: Machine) -> Iterator[Tensor]:
    """Yield images of the training split, (1, 3, H, W) each; of clips the frames, (T, 3, H, W)."""
    if "train" not in catalog.split_names:
        return
    rows = np.flatnonzero(catalog.split == catalog.split_names.index("train"))
    rows = rows[: -(-_FIT_IMAGES // recipe.frames)]
    size = (recipe.image_size, recipe.image_size)
    pictures = decoded_pictures(source, catalog.items(rows), size, machine.threads, recipe)
    with progress_bar("fitting the codec", len(rows), quiet=not machine.progress) as advance:
        for _, picture in pictures:
            advance(1)
            if isinstance(picture, Picture):
                yield torch.from_numpy(np.stack([frame.pixels for frame in frames_of(picture)]))


def _record_recipe(folder: Path, worker: Worker, asked: dict[str, Any]) -> None:
    """Write the recipe, or compare with the one that an earlier call or another rank has written."""
    full = {"request": asked, "codec": worker.codec.identity, "encoder": worker.encoder.identity}
    publish_once(folder / RECIPE_FILE, encode_json(full))
    refuse_mixing(folder, _read_json(folder / RECIPE_FILE) or {}, full)
    publish_once(folder / CODEC_FILE, codec_bytes(worker.codec))


# --- shards -----------------------------------------------------------------------------------------------------------


def _write_shards(
    folder: Path,
    work: Path,
    worker: Worker,
    catalog: Catalog,
    mine: list[ShardPlan],
    *,
    progress: bool,
    publish: Publish,
) -> None:
    unreadable = list(catalog.bad())
    total = catalog.total + len(unreadable)
    count = sum(len(plan.rows) for plan in mine)
    with progress_bar("writing shards", count, quiet=not progress) as advance:
        for plan in mine:
            table = table_of(folder, plan.name) or _write_shard(folder, work, worker, catalog, plan, publish)
            advance(len(plan.rows))
            unreadable += [Skipped(*entry) for entry in table.skipped]
            refuse_bad_share(unreadable, len(unreadable), total, worker.recipe.max_bad_share)


def _write_shard(
    folder: Path, work: Path, worker: Worker, catalog: Catalog, plan: ShardPlan, publish: Publish
) -> ShardTable:
    """Write and publish the tar, then its table: the table says that the tar is complete."""
    path = folder / f"{plan.name}.tar"
    skipped: list[tuple[str, str]] = []
    written = []
    counts: list[Counts] = []

    def write(temporary: Path) -> None:
        written.append(write_tar(temporary, _samples(worker, catalog, plan, skipped, counts)))

    write_atomically(path, write)
    places, text_length = written[0]
    table = ShardTable(
        split=plan.split,
        bucket=plan.resolution.name,
        size=path.stat().st_size,
        sha256=sha256_of(path),
        text_length=text_length,
        samples=places,
        skipped=skipped,
    )
    write_counts(counts_file(work, plan.name), sum(counts, Counts()))  # before the table, which says that all is done
    content = table_bytes(table)
    publish(path)
    publish(counts_file(work, plan.name))
    publish(folder / f"{plan.name}.json", content)  # before the ranks see it: the last one publishes the index
    write_atomically(folder / f"{plan.name}.json", content)
    return table


def _samples(
    worker: Worker, catalog: Catalog, plan: ShardPlan, skipped: list[tuple[str, str]], counts: list[Counts]
) -> Iterator[Encoded]:
    """Yield the samples of a shard; images that cannot be read are added to `skipped`, the counts to `counts`."""
    for batch in decoded_batches(worker, catalog.items(plan.rows), plan.resolution.image):
        skipped += [(entry.name, entry.reason) for entry in batch.skipped]
        if batch.items:
            for sample in encode_batch(worker, plan.resolution, batch):
                if isinstance(sample, Skipped):
                    skipped.append((sample.name, sample.reason))
                    continue
                counts.append(sample.counts)
                yield sample
