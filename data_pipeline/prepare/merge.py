"""Merge prepared folders: the tars are copied under new names, the tables and the index are written anew."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.encode.build import CODEC_FILE
from data_pipeline.identity import check_identity
from data_pipeline.index import EMPTY_FILE, INDEX_FILE, Bucket, Index, Shard, index_bytes, parse_table, table_bytes
from data_pipeline.prepare.ranks import lock
from data_pipeline.read.folder import read_index
from data_pipeline.store.store import LocalStore, Store
from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError

_CHUNK = 8 << 20  # bytes copied at a time


class _Part(NamedTuple):
    """One shard, with its store and its new name."""

    store: Store
    shard: Shard
    name: str


def merge_folders(
    stores: Sequence[Store], out: Path, link: bool = False, advance: Callable[[int], object] = id
) -> Index:
    """Write all shards of the folders into `out`, and its index last; an interrupted merge may be repeated.

    Every tar is compared with its sha256 while it is copied. With `link` tars of local folders are hard links, which
    takes no space, and are compared in size only. `advance` is called with numbers of bytes that were copied. Raises
    DataError where the folders were made with different recipes, where a key is in more than one of them, where a tar
    is damaged, and where `out` already holds an index.
    """
    indexes = [read_index(store)[0] for store in stores]
    for store, index in zip(stores[1:], indexes[1:], strict=True):
        _check_alike(stores[0], indexes[0], store, index)
    with lock(out):
        if (out / INDEX_FILE).exists():
            raise DataError(f"{out}: already holds prepared shards; choose another folder")
        seen: dict[str, str] = {}
        shards = [_take(part, out, link, seen, advance) for part in _parts(stores, indexes)]
        for name, sha256 in indexes[0].files.items():
            content = stores[0].small(name)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise DataError(f"{stores[0].location}/{name}: sha256 differs from the index; prepare it again")
            write_atomically(out / name, content)
        index = _joined(stores, indexes, shards)
        write_atomically(out / INDEX_FILE, index_bytes(index))
    return index


def _check_alike(first_store: Store, first: Index, store: Store, index: Index) -> None:
    check_identity("codec", store.location, found=index.codec, expected=first.codec)
    check_identity("text encoder", store.location, found=index.encoder, expected=first.encoder)
    check_identity("saliency", store.location, found=index.saliency, expected=first.saliency)
    empty = [i.files.get(EMPTY_FILE) for i in (first, index)]
    checks: list[tuple[str, object, object]] = [
        ("patch_size", first.patch_size, index.patch_size),
        ("frames", first.frames, index.frames),
        (CODEC_FILE, first.files.get(CODEC_FILE), index.files.get(CODEC_FILE)),
        (EMPTY_FILE, empty[0], empty[1]),
    ]
    for name, there, here in checks:
        if there != here:
            raise DataError(
                f"{store.location}: {name} is {here}, {first_store.location} has {there}; prepare both alike, or train "
                "on both as a mixture (data.shards)"
            )


def _parts(stores: Sequence[Store], indexes: Sequence[Index]) -> list[_Part]:
    """Return all shards, numbered anew in every split and bucket."""
    buckets = {name for index in indexes for name in index.buckets}
    counts: dict[str, int] = {}
    parts = []
    for store, index in zip(stores, indexes, strict=True):
        for shard in index.shards:
            stem = shard.split if len(buckets) == 1 else f"{shard.split}-{shard.bucket}"
            counts[stem] = counts.get(stem, -1) + 1
            parts.append(_Part(store, shard, f"{stem}-{counts[stem]:05d}"))
    return parts


def _take(part: _Part, out: Path, link: bool, seen: dict[str, str], advance: Callable[[int], object]) -> Shard:
    """Copy or link one shard into `out`: its tar, then its table."""
    where = f"{part.store.location}/{part.shard.name}"
    content = part.store.small(f"{part.shard.name}.json")
    if hashlib.sha256(content).hexdigest() != part.shard.table_sha256:
        raise DataError(f"{where}.json: sha256 differs from the index; prepare the shard again")
    table = dataclasses.replace(parse_table(content, f"{where}.json"), bucket=part.shard.bucket)
    for key, _ in table.samples:
        if key in seen:
            raise DataError(f"{where}.tar: key {key} is in {seen[key]} too; merge folders that share no picture")
        seen[key] = f"{where}.tar"
    target = out / f"{part.name}.tar"
    if link and isinstance(part.store, LocalStore):
        target.unlink(missing_ok=True)
        os.link(f"{where}.tar", target)
        advance(part.shard.size)
        sound = target.stat().st_size == part.shard.size
    else:
        digest = hashlib.sha256()
        write_atomically(target, lambda path: _copy(part, path, digest.update, advance))
        sound = digest.hexdigest() == part.shard.sha256
    if not sound:
        target.unlink()
        raise DataError(f"{where}.tar: damaged; prepare the shard again")
    written = table_bytes(table)
    write_atomically(out / f"{part.name}.json", written)
    return dataclasses.replace(part.shard, name=part.name, table_sha256=hashlib.sha256(written).hexdigest())


def _copy(part: _Part, target: Path, update: Callable[[bytes], object], advance: Callable[[int], object]) -> None:
    name = f"{part.shard.name}.tar"
    size = part.store.size(name)
    with target.open("wb") as file:
        for start in range(0, size, _CHUNK):
            content = part.store.read(name, start, min(_CHUNK, size - start))
            update(content)
            file.write(content)
            advance(len(content))


def _joined(stores: Sequence[Store], indexes: Sequence[Index], shards: list[Shard]) -> Index:
    buckets: dict[str, Bucket] = {}
    for index in indexes:
        for name, bucket in index.buckets.items():
            count = sum(shard.num_samples for shard in shards if shard.bucket == name)
            buckets[name] = bucket._replace(num_samples=count)
    splits = {name: sum(s.num_samples for s in shards if s.split == name) for name in sorted({s.split for s in shards})}
    sources = [
        {"location": Path(store.location).name, **index.source} for store, index in zip(stores, indexes, strict=True)
    ]
    return dataclasses.replace(
        indexes[0],
        source={"kind": "merge", "sources": sources},
        buckets=buckets,
        text_length=max(index.text_length for index in indexes),
        splits=splits,
        shards=shards,
        skipped=[entry for index in indexes for entry in index.skipped],
    )
