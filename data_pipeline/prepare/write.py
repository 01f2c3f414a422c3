"""Pictures and captions to a folder of shards, by one process or by many.

    recipe.json          what was asked for; compared before anything is added
    codec.safetensors    the codec, with its fitted arrays
    SHARD.tar            WebDataset shard; SHARD is SPLIT-00000, or SPLIT-BUCKET-00000 where there are several buckets
    SHARD.json           its table; there only when the tar is complete
    empty_text.npz       the embedding of the empty caption
    skipped.jsonl        what was left out, and why; there only if something was
    index.json           written last
    .work                listings of the source; removed at the end

Every file appears under its final name only when it is complete, and the same pictures give the same bytes: a killed
run leaves nothing half-written, and the next one writes what is missing. Ranks share nothing but these files: every
shard belongs to one rank by the hash of its contents, and the rank that finishes last writes the index.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.encode.codecs import CODEC_FILE, Codec, build_codec, codec_bytes, load_codec
from data_pipeline.encode.texts import build_text_encoder
from data_pipeline.index import INDEX_FILE, Table, table_bytes
from data_pipeline.members import encode_json
from data_pipeline.prepare import buckets, encoding
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.encoding import Encoded, Worker
from data_pipeline.prepare.files import file_sha256, lock, publish, read_json, remove_temporary, write_atomic
from data_pipeline.prepare.finish import (
    WORK_FOLDER,
    Summary,
    clear_away,
    complete_index,
    refuse_bad_share,
    summary,
    table_of,
    write_index,
)
from data_pipeline.prepare.plan import Plan, plans, share
from data_pipeline.prepare.ranks import Rank, wait
from data_pipeline.prepare.recipe import RECIPE_FILE, Recipe, check, refuse_mixing, request
from data_pipeline.prepare.survey import Catalog, refuse_missing, survey
from data_pipeline.prepare.tarring import write_tar
from data_pipeline.sources.images import Picture
from data_pipeline.sources.items import Skipped, Source, hash_text
from sharpmoe.errors import DataError

_FIT_IMAGES = 20_000  # enough for the covariance of a patch; more only takes time


class Means(NamedTuple):
    """What a preparation runs on; nothing here changes what it writes."""

    device: str = "cpu"  # of the autoencoder and the text encoder
    threads: int = 1  # that decode pictures
    place: Rank = Rank()
    progress: bool = True
    say: Callable[[str], object] = lambda line: None  # told what is found out about the source


_PLAIN = Means()


def prepare(source: Source, folder: Path, recipe: Recipe, means: Means = _PLAIN) -> Summary:
    """Write `source` as shards into `folder`, or finish what an earlier call began; a complete folder is left alone.

    With several ranks every rank calls this with its own place; a rank that is done before the others returns a
    summary that is not complete.

    Raises DataError where the folder was begun with another configuration, where too many pictures are unusable, or
    where a latent is not finite.
    """
    check(recipe)
    digests = [unit.digest for unit in source.units()]
    asked = request(source.identity(digests), recipe)
    with lock(folder, shared=means.place.size > 1):
        _refuse_other_request(folder, asked)
        index = complete_index(folder)
        if index is not None:
            clear_away(folder)  # a run may have been killed right after its index
            return summary(folder, index, worked=False)
        try:
            return _work(source, folder, recipe, means, digests, asked)
        except FileNotFoundError:  # another rank has finished it all, and cleared away our listings
            index = complete_index(folder)
            if index is None:
                raise
            return summary(folder, index, worked=False)


def _refuse_other_request(folder: Path, asked: dict[str, Any]) -> None:
    """Compare with the recipe of an earlier call; it is written before anything else."""
    begun = read_json(folder / RECIPE_FILE)
    if begun is not None:
        refuse_mixing(folder, begun["request"], asked)
    elif next(folder.glob("*.tar"), None) or (folder / INDEX_FILE).exists():
        raise DataError(f"{folder}: holds shards but no {RECIPE_FILE}; choose another --out, or delete the folder")


def _work(
    source: Source, folder: Path, recipe: Recipe, means: Means, digests: list[str], asked: dict[str, Any]
) -> Summary:
    if means.place.size == 1:
        remove_temporary(folder)
    work = folder / WORK_FOLDER / hash_text(json.dumps(asked))[:16]
    survey(source, work, digests, means.place, bool(recipe.buckets), means.threads)
    catalog = Catalog(work, digests, recipe.limit)
    check_catalog(catalog, recipe)
    codec = _codec(source, folder, work, catalog, recipe, means)
    resolutions = buckets.table(recipe.buckets, recipe.image_size, recipe.patch_size, codec.latent_shape)
    worker = Worker(source, recipe, codec, build_text_encoder(recipe.encoder, means.device), means.threads)
    _record_recipe(folder, worker, asked)
    chosen = buckets.choose(catalog.pixels, resolutions)
    for line in describe(catalog, resolutions, chosen):
        means.say(line)
    every = plans(catalog, resolutions, chosen, recipe.shard_samples)
    _write_shards(folder, worker, catalog, share(every, means.place), means.progress)
    if any(table_of(folder, plan.name) is None for plan in every):
        return Summary(folder, {}, {}, [], 0, worked=True, complete=False)
    index = write_index(folder, worker, asked["source"], catalog, every, resolutions)
    return summary(folder, index, worked=True)


def check_catalog(catalog: Catalog, recipe: Recipe) -> None:
    """Raise a DataError where pictures are missing, too many are unusable, or none is left."""
    refuse_missing(catalog, recipe.allow_missing)
    skipped = list(catalog.left_out())
    refuse_bad_share(skipped, len(skipped), catalog.total + len(skipped), recipe.max_bad_share)
    if not len(catalog):
        raise DataError("the source holds no picture that can be used")


def describe(catalog: Catalog, resolutions: list[Resolution], chosen: np.ndarray) -> list[str]:
    """What the buckets hold."""
    train = np.zeros(len(catalog), bool)
    if "train" in catalog.split_names:
        train = catalog.split == catalog.split_names.index("train")
    return buckets.report(resolutions, chosen, catalog.pixels, train)


# --- codec and recipe -------------------------------------------------------------------------------------------------


def _codec(source: Source, folder: Path, work: Path, catalog: Catalog, recipe: Recipe, means: Means) -> Codec:
    """The folder's codec, or a new one: fitted by the first rank, and taken over by the others."""
    if (folder / RECIPE_FILE).exists() and (folder / CODEC_FILE).exists():
        return load_codec(folder, means.device)
    fitted = work / CODEC_FILE
    if recipe.codec["kind"] == "patch_pca" and means.place.rank:
        wait(lambda: int(not fitted.exists()))
    if not fitted.exists():
        images = training_images(source, catalog, recipe, means)
        publish(fitted, codec_bytes(build_codec(recipe.codec, images, means.device)))
    return load_codec(work, means.device)


def training_images(source: Source, catalog: Catalog, recipe: Recipe, means: Means) -> Iterator[Tensor]:
    """Pictures of the training split, (1, 3, H, W) each."""
    if "train" not in catalog.split_names:
        return
    rows = np.flatnonzero(catalog.split == catalog.split_names.index("train"))[:_FIT_IMAGES]
    pictures = encoding.decoded(source, catalog.items(rows), (recipe.image_size, recipe.image_size), means.threads)
    shown = tqdm(pictures, "fitting the codec", len(rows), unit="image", disable=None if means.progress else True)
    for _, picture in shown:
        if isinstance(picture, Picture):
            yield torch.from_numpy(picture.pixels)[None]


def _record_recipe(folder: Path, worker: Worker, asked: dict[str, Any]) -> None:
    """Write down what is asked for, or compare with what an earlier call or another rank has written."""
    full = {"request": asked, "codec": worker.codec.identity, "encoder": worker.encoder.identity}
    publish(folder / RECIPE_FILE, encode_json(full))
    refuse_mixing(folder, read_json(folder / RECIPE_FILE) or {}, full)
    publish(folder / CODEC_FILE, codec_bytes(worker.codec))


# --- shards -----------------------------------------------------------------------------------------------------------


def _write_shards(folder: Path, worker: Worker, catalog: Catalog, mine: list[Plan], progress: bool) -> None:
    unreadable = list(catalog.left_out())
    total = catalog.total + len(unreadable)
    count = sum(len(plan.rows) for plan in mine)
    with tqdm(total=count, desc="writing shards", unit="image", disable=None if progress else True) as bar:
        for plan in mine:
            table = table_of(folder, plan.name) or _write_shard(folder, worker, catalog, plan)
            bar.update(len(plan.rows))
            unreadable += [Skipped(*entry) for entry in table.skipped]
            refuse_bad_share(unreadable, len(unreadable), total, worker.recipe.max_bad_share)


def _write_shard(folder: Path, worker: Worker, catalog: Catalog, plan: Plan) -> Table:
    """Write the tar, then its table: the table says that the tar is complete."""
    path = folder / f"{plan.name}.tar"
    skipped: list[tuple[str, str]] = []
    written = []

    def write(temporary: Path) -> None:
        written.append(write_tar(temporary, _samples(worker, catalog, plan, skipped)))

    write_atomic(path, writer=write)
    places, text_length = written[0]
    sizes = path.stat().st_size, file_sha256(path)
    table = Table(plan.split, plan.resolution.name, *sizes, text_length, places, skipped)
    write_atomic(folder / f"{plan.name}.json", table_bytes(table))
    return table


def _samples(worker: Worker, catalog: Catalog, plan: Plan, skipped: list[tuple[str, str]]) -> Iterator[Encoded]:
    """The samples of a shard; `skipped` gets what cannot be read."""
    for chunk in encoding.chunks(worker, catalog.items(plan.rows), plan.resolution.image):
        skipped += [(entry.name, entry.reason) for entry in chunk.skipped]
        if chunk.items:
            yield from encoding.encode(worker, plan.resolution, chunk)
