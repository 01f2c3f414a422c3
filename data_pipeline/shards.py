"""Prepared shards, read by index: any sample of any shard in one seek, checked before it is believed."""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode import CODEC_FILE, Codec, Identity, TextEncoder, check_identity, load_codec
from data_pipeline.schema import Batch
from data_pipeline.write import EMPTY_FILE, INDEX_FILE, SCHEMA_VERSION, file_sha256
from sharpmoe.errors import DataError

_BLOCK_SHARDS = 4  # samples are mixed within so many shards at a time, which keeps reads near each other
_REWRITE = "run launcher/prepare.py again as before: it writes only what is missing"
_Places = Mapping[str, Sequence[int]]  # member extension -> (offset, size, crc32)


class ShardSet:
    """One split of a prepared folder. Safe in DataLoader workers: files are opened per process and read with pread."""

    split: str
    num_samples: int
    latent_shape: tuple[int, int, int]  # (C, H, W)
    grid: tuple[int, int]  # tokens (h, w)
    text_length: int  # L: every text is padded to so many tokens
    text_width: int
    pooled_width: int
    image_size: int
    patch_size: int
    codec: Identity
    encoder: Identity
    splits: dict[str, int]  # samples of every split of the folder
    shard_sizes: tuple[int, ...]  # samples of every shard of this split
    fingerprint: str  # sha256 of the index, which vouches for every other file

    def __init__(self, folder: Path, split: str, index: dict[str, Any], fingerprint: str) -> None:
        """Use `ShardSet.open`."""
        self.folder, self.split, self.fingerprint = folder, split, fingerprint
        self.latent_shape, self.grid = tuple(index["latent_shape"]), tuple(index["grid"])
        self.text_length, self.text_width = index["text_length"], index["text_width"]
        self.pooled_width, self.image_size = index["pooled_width"], index["image_size"]
        self.patch_size, self.codec, self.encoder = index["patch_size"], index["codec"], index["encoder"]
        self.splits = index["splits"]
        self._shards = [shard for shard in index["shards"] if shard["split"] == split]
        self.shard_sizes = tuple(shard["num_samples"] for shard in self._shards)
        self.num_samples = sum(self.shard_sizes)
        self._first = np.cumsum([0, *self.shard_sizes])
        self._tables = [self._table(shard) for shard in self._shards]
        self._files = index["files"]
        self._descriptors: dict[tuple[int, int], int] = {}  # (process id, shard) -> file descriptor

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "ShardSet":
        """Read the index and check that every shard of the split is there in full size.

        Raises DataError where the folder was never prepared, the split does not exist or is empty, or a shard is
        missing or cut short.
        """
        folder = Path(folder)
        try:
            content = (folder / INDEX_FILE).read_bytes()
            index = json.loads(content)
        except FileNotFoundError:
            raise DataError(
                f"{folder}: no {INDEX_FILE}; run `python launcher/prepare.py --out {folder}`, which also "
                "finishes what an earlier run began"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise DataError(f"{folder / INDEX_FILE}: damaged; delete it and run launcher/prepare.py again") from None
        if index.get("schema") != SCHEMA_VERSION:
            raise DataError(
                f"{folder / INDEX_FILE}: schema {index.get('schema')!r}, expected {SCHEMA_VERSION}; "
                "prepare the data again with this version"
            )
        if not index["splits"].get(split):
            raise DataError(f"{folder}: no samples in split {split!r}; it has {_counts(index['splits'])}")
        return cls(folder, split, index, hashlib.sha256(content).hexdigest())

    def _table(self, shard: dict[str, Any]) -> list[tuple[str, _Places]]:
        """Keys and places of a shard's samples, after a look at the size of its tar."""
        tar = self._path(shard)
        if not tar.is_file():
            raise DataError(f"{tar}: shard is missing; {_REWRITE}")
        if tar.stat().st_size != shard["size"]:
            raise DataError(
                f"{tar}: shard has {tar.stat().st_size} bytes, expected {shard['size']}; delete it and {_REWRITE}"
            )
        content = _checked(tar.with_suffix(".json"), shard["table_sha256"])
        return [(key, places) for key, places in json.loads(content)["samples"]]

    def verify(self) -> None:
        """Read every shard of the split in full and compare its sha256; DataError names the first that differs."""
        for shard in self._shards:
            if file_sha256(self._path(shard)) != shard["sha256"]:
                raise DataError(f"{self._path(shard)}: sha256 differs from the index; delete it and {_REWRITE}")

    def require(self, codec: Identity | None = None, encoder: Identity | None = None) -> None:
        """Raise a DataError naming the differing key where these shards were made with another codec or encoder."""
        if codec is not None:
            check_identity("codec", str(self.folder), found=self.codec, expected=codec)
        if encoder is not None:
            check_identity("text encoder", str(self.folder), found=self.encoder, expected=encoder)

    def codec_object(self, device: str = "cpu") -> Codec:
        """The codec that made the latents, to turn samples back into images."""
        codec = load_codec(self.folder, device)
        check_identity("codec", str(self.folder / CODEC_FILE), found=codec.identity, expected=self.codec)
        return codec

    def text_encoder(self, device: str = "cpu") -> TextEncoder:
        """The encoder that made the text states, for captions of the user's own."""
        return TextEncoder.from_identity(self.encoder, device)

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """The empty caption: text (L, D) float32, mask (L,) bool, pooled (D_pooled,) float32."""
        content = _checked(self.folder / EMPTY_FILE, self._files[EMPTY_FILE])
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            text, mask = self._padded(arrays["text"])
            return torch.from_numpy(text), torch.from_numpy(mask), torch.from_numpy(arrays["pooled"])

    def batch(self, indices: Sequence[int], positions: Sequence[int] | None = None) -> Batch:
        """The samples of these indices (0 .. num_samples - 1); `positions` defaults to the indices.

        Raises DataError naming shard and key where a sample is damaged, of another shape, or not finite.
        """
        rows = [self._sample(int(index)) for index in indices]
        texts, masks = zip(*(self._padded(row["text"]) for row in rows), strict=True)
        places = indices if positions is None else positions
        return Batch(
            latent=_stack([row["latent"] for row in rows]),
            text=_stack(texts),
            text_mask=torch.from_numpy(np.stack(masks)),
            pooled=_stack([row["pooled"] for row in rows]),
            label=torch.tensor([row["label"] for row in rows], dtype=torch.int64),
            saliency=_stack([row["saliency"] for row in rows]),
            foreground=_stack([row["foreground"] for row in rows]),
            position=torch.tensor([int(place) for place in places], dtype=torch.int64),
            keys=tuple(row["key"] for row in rows),
            captions=tuple(row["caption"] for row in rows),
        )

    def _sample(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        key, places = self._tables[number][index - int(self._first[number])]
        where = f"{self._path(self._shards[number])}, key {key}"
        members = {name: self._read(number, places, name, where) for name in places}
        sample: dict[str, Any] = {
            name: _array(members[f"{name}.npy"], shape, f"{where}.{name}.npy")
            for name, shape in self._shapes().items()
            if f"{name}.npy" in members
        }
        sample.setdefault("foreground", np.full(self.grid[0] * self.grid[1], np.nan, dtype=np.float32))
        label = json.loads(members["json"])["label"]
        return {**sample, "key": key, "caption": members["txt"].decode(), "label": label}

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        tokens = self.grid[0] * self.grid[1]
        return {
            "latent": self.latent_shape,
            "text": (None, self.text_width),
            "pooled": (self.pooled_width,),
            "saliency": (tokens,),
            "foreground": (tokens,),
        }

    def _read(self, number: int, places: _Places, name: str, where: str) -> bytes:
        offset, size, checksum = places[name]
        descriptor = self._descriptors.get((os.getpid(), number))
        if descriptor is None:
            descriptor = _open(self._path(self._shards[number]))
            self._descriptors[os.getpid(), number] = descriptor
        content = os.pread(descriptor, size, offset)
        if zlib.crc32(content) != checksum:
            raise DataError(
                f"{where}.{name}: checksum differs from the index, the shard is damaged; delete it and {_REWRITE}"
            )
        return content

    def _padded(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((self.text_length, self.text_width), dtype=np.float32)
        padded[: len(text)] = text
        return padded, np.arange(self.text_length) < len(text)

    def _path(self, shard: Mapping[str, Any]) -> Path:
        return self.folder / f"{shard['name']}.tar"

    def __getstate__(self) -> dict[str, Any]:
        """File descriptors belong to one process."""
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        """Close what this process opened."""
        for (process, _), descriptor in getattr(self, "_descriptors", {}).items():
            if process == os.getpid():
                os.close(descriptor)


def order(shard_sizes: Sequence[int], seed: int, epoch: int, block: int = _BLOCK_SHARDS) -> np.ndarray:
    """The permutation of all sample indices of one epoch, (num_samples,) int64.

    Shards are permuted, then samples are mixed within blocks of `block` shards. A pure function of its arguments: it
    needs no state, no rank and no communication.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    first = np.cumsum([0, *shard_sizes])
    shards = generator.permutation(len(shard_sizes))
    blocks = [shards[start : start + block] for start in range(0, len(shards), block)]
    return np.concatenate(
        [
            generator.permutation(np.concatenate([np.arange(first[i], first[i + 1]) for i in members]))
            for members in blocks
        ]
    )


def sample_indices(shard_sizes: Sequence[int], seed: int, positions: Sequence[int]) -> list[int]:
    """Sample index of every global position: epoch = position // num_samples."""
    sizes, num_samples = tuple(shard_sizes), sum(shard_sizes)
    epochs = {position // num_samples for position in positions}
    orders = {epoch: _cached_order(sizes, seed, epoch) for epoch in epochs}
    return [int(orders[position // num_samples][position % num_samples]) for position in positions]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _cached_order(shard_sizes: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    return order(shard_sizes, seed, epoch)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: shard cannot be opened ({error.strerror}); {_REWRITE}") from None


def _checked(path: Path, sha256: str) -> bytes:
    """A small file whose checksum is in the index."""
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: missing or damaged; delete it and {_REWRITE}")
    return content


def _array(content: bytes, shape: tuple[int | None, ...], where: str) -> np.ndarray:
    """A .npy member as float32, never unpickled; DataError where its shape or a value is wrong."""
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{where}: not a plain .npy array ({error}); prepare the data again") from None
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        raise DataError(f"{where}: shape {array.shape}, expected {shape}; prepare the data again")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{where}: holds NaN or infinity; prepare the data again")
    return array


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in splits.items())
