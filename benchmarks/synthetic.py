"""Shards of random numbers in the format of data_pipeline, to measure how fast they are read."""

import hashlib
import io
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.index import (
    EMPTY_FILE,
    INDEX_FILE,
    Bucket,
    Index,
    Shard,
    ShardTable,
    bucket_name,
    index_bytes,
    table_bytes,
)
from data_pipeline.members import encode_json, encode_npy, encode_npz

IMAGE = 256
_EDGE, _PATCH, _POOLED = 32, 2, 768


class Text(NamedTuple):
    """Shape of a caption's token states."""

    length: int
    width: int


def write_shards(folder: Path, text: Text, num_shards: int, shard_samples: int) -> Path:
    """Write latents 4x32x32, texts of full length, M, caption and label, as prepared data holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    return _finish(
        folder, text, [_shard(folder, _name(number), text, shard_samples, generator) for number in range(num_shards)]
    )


def link_shards(folder: Path, text: Text, num_shards: int, shard_samples: int) -> Path:
    """Link one shard under many names, for an index of any size on a small disk."""
    folder.mkdir(parents=True, exist_ok=True)
    one = _shard(folder, "one", text, shard_samples, np.random.default_rng(0))
    for number in range(num_shards):
        for suffix in (".tar", ".json"):
            (folder / f"{_name(number)}{suffix}").hardlink_to(folder / f"one{suffix}")
    return _finish(folder, text, [replace(one, name=_name(number)) for number in range(num_shards)])


def _name(number: int) -> str:
    return f"train-{number:05d}"


def _finish(folder: Path, text: Text, shards: list[Shard]) -> Path:
    empty = encode_npz({"text": np.zeros((2, text.width), np.float16), "pooled": np.zeros(_POOLED, np.float32)})
    (folder / EMPTY_FILE).write_bytes(empty)
    files = {EMPTY_FILE: hashlib.sha256(empty).hexdigest()}
    (folder / INDEX_FILE).write_bytes(index_bytes(_index(text, shards, files)))
    return folder


def _index(text: Text, shards: list[Shard], files: dict[str, str]) -> Index:
    """Return the index of one square bucket."""
    count, tokens = sum(shard.num_samples for shard in shards), _EDGE // _PATCH
    bucket = Bucket((IMAGE, IMAGE), (4, _EDGE, _EDGE), (tokens, tokens), count)
    what = {"kind": "synthetic"}
    return Index(
        source=what,
        buckets={bucket_name((IMAGE, IMAGE)): bucket},
        patch_size=_PATCH,
        text_length=text.length,
        text_width=text.width,
        pooled_width=_POOLED,
        codec=what,
        encoder=what,
        splits={"train": count},
        shards=shards,
        files=files,
        skipped=[],
    )


def _shard(folder: Path, name: str, text: Text, count: int, generator: np.random.Generator) -> Shard:
    stream, samples = io.BytesIO(), []
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            key, places = f"{name}-{number:06d}", {}
            for extension, content in _members(key, text, generator).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                places[extension] = (stream.tell() + tarfile.BLOCKSIZE, len(content), zlib.crc32(content))
                tar.addfile(info, io.BytesIO(content))
            samples.append((key, places))
    content = stream.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    bucket = bucket_name((IMAGE, IMAGE))
    table = table_bytes(
        ShardTable(
            split="train",
            bucket=bucket,
            size=len(content),
            sha256=digest,
            text_length=text.length,
            samples=samples,
            skipped=[],
        )
    )
    (folder / f"{name}.tar").write_bytes(content)
    (folder / f"{name}.json").write_bytes(table)
    return Shard(
        name=name,
        split="train",
        bucket=bucket,
        num_samples=count,
        size=len(content),
        sha256=digest,
        table_sha256=hashlib.sha256(table).hexdigest(),
    )


def _members(key: str, text: Text, generator: np.random.Generator) -> dict[str, bytes]:
    arrays: dict[str, np.ndarray] = {
        "latent": generator.standard_normal((4, _EDGE, _EDGE), dtype=np.float32).astype(np.float16),
        "saliency": generator.random((_EDGE // _PATCH) ** 2, dtype=np.float32),
        "text": generator.standard_normal((text.length, text.width), dtype=np.float32).astype(np.float16),
        "pooled": generator.standard_normal(_POOLED, dtype=np.float32),
    }
    members = {f"{name}.npy": encode_npy(array) for name, array in arrays.items()}
    caption = f"a caption of sample {key}"
    return {
        **members,
        "json": encode_json({"file": f"{key}.png", "label": 7, "split": "train"}),
        "txt": caption.encode(),
    }
