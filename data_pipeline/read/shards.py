"""Read prepared shards by index: any sample of any shard in one read, checked before it is used."""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.build import CODEC_FILE, load_codec, restore_text_encoder
from data_pipeline.encode.codecs import Codec
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.identity import check_identity
from data_pipeline.index import EMPTY_FILE, Bucket, Identity, Index, Places, Shard
from data_pipeline.members import as_float32, decode_npz
from data_pipeline.read.batches import collate
from data_pipeline.read.damage import Damage, how_to_rewrite
from data_pipeline.read.folder import check_files, checked_file, ends_in_zeros, read_index, read_table
from data_pipeline.read.samples import Draw, Sample, Span, Spec, load_label, load_sample
from data_pipeline.schema import Batch
from data_pipeline.store.remote import RemoteOptions
from data_pipeline.store.store import LocalStore, Store, open_store
from sharpmoe.errors import DamageError, DataError

_SPLIT = re.compile(r"([^:/\s]+)(?::([1-9][0-9]*)/([1-9][0-9]*))?")
_TABLES = 16  # kept in memory: samples are mixed within blocks of fewer shards


class _Opened(NamedTuple):
    """What is known of a shard beside its samples."""

    samples: Sequence[tuple[str, Places]]
    size: int  # actual bytes of the tar


class SplitPart(NamedTuple):
    """A split of the shards, or every `of`-th sample of it from the `number`-th on (1-based)."""

    split: str
    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str) -> "SplitPart":
        """Read SPLIT or SPLIT:I/N. Raises ValueError."""
        found = _SPLIT.fullmatch(text)
        part = cls(found[1], int(found[2] or 1), int(found[3] or 1)) if found else None
        if part is None or part.number > part.of:
            raise ValueError(f"split {text!r}: expected SPLIT or SPLIT:I/N with I up to N, such as unseen:1/2")
        return part


def check_split_name(name: str) -> None:
    """Raise DataError where no reader could name a split so: it is stored in no other way than it is read."""
    with suppress(ValueError):
        if SplitPart.read(name) == SplitPart(name):
            return
    raise DataError(f"split {name!r}: a name of a split has no blanks, `/` or `:`; give it another, such as train")


class ShardSet:
    """One split of a prepared folder, or a part of it, local or remote. Safe in threads and in DataLoader workers.

    Sample indices count through the buckets, one after the other, and in each through its shards.
    """

    split: str  # as it was asked for: unseen, or unseen:1/2
    location: str  # folder or URL, without credentials
    num_samples: int
    buckets: dict[str, Bucket]  # those of which the split has samples, in the order of the indices
    bucket_shards: dict[str, tuple[int, ...]]  # samples of every shard of every bucket, in the order of the indices
    main_bucket: str  # the square one or, without one, the largest
    latent_shape: tuple[int, ...]  # (C, h, w) of the main bucket, or (C, T, h, w)
    grid: tuple[int, ...]  # tokens (h, w) of the main bucket, or (T, h, w)
    frames: int  # of every sample; 1 for still images
    image_size: int  # pixels: side of the square with the area of the main bucket's images
    text_length: int  # L: tokens to which every text is padded
    text_width: int
    pooled_width: int
    patch_size: int
    codec: Identity
    encoder: Identity
    saliency: Identity  # where the maps come from
    splits: dict[str, int]  # samples of every split of the folder
    fingerprint: str  # sha256 of the index, which holds the checksums of all other files

    def __init__(self, store: Store, split: str, index: Index, fingerprint: str) -> None:
        """Use `ShardSet.open`."""
        self.location, self.split, self.fingerprint = store.location, split, fingerprint
        self.text_length, self.text_width, self.pooled_width = index.text_length, index.text_width, index.pooled_width
        self.patch_size, self.codec, self.encoder = index.patch_size, index.codec, index.encoder
        self.saliency = index.saliency
        self.splits = index.splits
        self._store, self._files = store, index.files
        self._arrange(index)
        self._opened: dict[int, _Opened | Damage] = {}  # by shard, the latest few
        self._flaws: list[Damage] = []  # of shards opened since the last call of `flaws`

    def _arrange(self, index: Index) -> None:
        """Put the shards of this split in order, bucket by bucket."""
        part = SplitPart.read(self.split)
        mine = [shard for shard in index.shards if shard.split == part.split and shard.num_samples]
        self._shards = [shard for name in index.buckets for shard in mine if shard.bucket == name]
        first = np.cumsum([0, *(shard.num_samples for shard in self._shards)])
        self._rows = range(part.number - 1, int(first[-1]), part.of)  # of the split, one per sample of the part
        ends = [-(-max(int(end) - self._rows.start, 0) // part.of) for end in first]  # samples of the part before them
        sizes: dict[str, list[int]] = {}
        for shard, start, end in zip(self._shards, ends, ends[1:], strict=False):
            sizes.setdefault(shard.bucket, []).append(end - start)
        sizes = {name: kept for name, counts in sizes.items() if (kept := [count for count in counts if count])}
        self.bucket_shards = {name: tuple(counts) for name, counts in sizes.items()}
        self.buckets = {name: index.buckets[name] for name in sizes}
        self._first, self._ends = first, ends
        self.num_samples = len(self._rows)
        square = [name for name, bucket in self.buckets.items() if bucket.image[0] == bucket.image[1]]
        self.main_bucket = max(square or sizes, key=lambda name: sum(sizes[name]))
        main = self.buckets[self.main_bucket]
        self.latent_shape, self.grid, self.frames = main.latent, main.grid, main.frames
        self.image_size = math.isqrt(main.image[0] * main.image[1])
        widths = self.text_length, self.text_width, self.pooled_width
        self._specs = {name: Spec(bucket.latent, bucket.grid, *widths) for name, bucket in self.buckets.items()}

    @classmethod
    def open(
        cls, location: str | Path, split: str, remote: RemoteOptions | None = None, accept_damage: bool = False
    ) -> "ShardSet":
        """Read the index, and check that every shard of the split in a local folder and its table exist in full size.

        `split`: SPLIT, or SPLIT:I/N for every N-th sample from the I-th on, so that settings can be chosen on one part
        and reported on another. With `accept_damage` the shards are checked only when they are read. Raises DataError
        where the folder was never prepared, the split or the part does not exist or is empty, or a shard is missing or
        cut short.
        """
        store = open_store(location, remote)
        index, fingerprint = read_index(store)
        try:
            part = SplitPart.read(split)
        except ValueError as error:
            raise DataError(f"{store.location}: {error}") from None
        if index.splits.get(part.split, 0) < part.number:
            raise DataError(f"{store.location}: no samples in split {split!r}; it has {_counts(index.splits)}")
        shards = cls(store, split, index, fingerprint)
        if isinstance(store, LocalStore) and not accept_damage:
            for shard in shards._shards:
                check_files(store, shard)
        return shards

    def require(self, codec: Identity | None = None, encoder: Identity | None = None) -> None:
        """Raise a DataError naming the differing key where these shards were made with another codec or encoder."""
        if codec is not None:
            check_identity("codec", self.location, found=self.codec, expected=codec)
        if encoder is not None:
            check_identity("text encoder", self.location, found=self.encoder, expected=encoder)

    def require_still(self, what: str) -> None:
        """Raise a DataError where samples are clips, and `what` is made for still images."""
        if self.frames > 1:
            raise DataError(
                f"{self.location}: holds clips of {self.frames} frames; {what} takes still images alone: prepare some "
                "without --frames"
            )

    def codec_object(self, device: str = "cpu") -> Codec:
        """Load the codec that made the latents, to decode samples to images. Raises DataError."""
        where = f"{self.location}/{CODEC_FILE}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                (Path(folder) / CODEC_FILE).write_bytes(self._store.small(CODEC_FILE))
            except DamageError:
                raise DataError(f"{where}: missing; {how_to_rewrite()}") from None
            codec = load_codec(Path(folder), device)
        check_identity("codec", where, found=codec.identity, expected=self.codec)
        return codec

    def text_encoder(self, device: str = "cpu") -> TextEncoder:
        """Load the encoder that made the text states, for new captions. Raises DataError."""
        return restore_text_encoder(self.encoder, device)

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the empty caption: text (L, D) float32, mask (L,) bool, pooled (D_pooled,) float32, which may be 0."""
        content = checked_file(self._store, EMPTY_FILE, self._files.get(EMPTY_FILE, ""))
        if content is None:
            raise DataError(f"{self.location}/{EMPTY_FILE}: missing or damaged; delete it and {how_to_rewrite()}")
        try:
            arrays = decode_npz(content)
        except DamageError as error:
            raise DataError(f"{self.location}/{EMPTY_FILE}: {error}; {how_to_rewrite()}") from None
        text = np.zeros((self.text_length, self.text_width), dtype=np.float32)
        text[: len(arrays["text"])] = as_float32(arrays["text"])
        mask = torch.arange(self.text_length) < len(arrays["text"])
        pooled = arrays["pooled"] if self.pooled_width else np.zeros(0)
        return torch.from_numpy(text), mask, torch.from_numpy(pooled.astype(np.float32))

    def batch(self, indices: Sequence[int], positions: Sequence[int] | None = None) -> Batch:
        """Read the samples of these indices, all of one bucket, without random choices: first caption, mean latent.

        `positions` defaults to the indices. Raises DataError naming shard and key where a sample is damaged, of another
        shape, or not finite.
        """
        samples = []
        for index in indices:
            sample = self.load(int(index))
            for damage in [*self.flaws(), *([sample] if isinstance(sample, Damage) else [])]:
                raise damage.error()
            assert isinstance(sample, Sample)
            samples.append(sample)
        return collate(samples, indices if positions is None else positions, self.text_length)

    def bucket_of(self, index: int) -> str:
        """Return the name of a sample's bucket."""
        return self._shards[self._number(index)].bucket

    def indices_of(self, bucket: str) -> range:
        """Return the sample indices of a bucket."""
        inside = [number for number, shard in enumerate(self._shards) if shard.bucket == bucket]
        return range(self._ends[inside[0]], self._ends[inside[-1] + 1])

    def load(self, index: int, draw: Draw | None = None) -> Sample | Damage:
        """Read one sample, or return what is wrong with it. Raises DataError where the store cannot be read."""
        number = self._number(index)
        shard, opened = self._shards[number], self._open(number)
        row = self._rows[index] - int(self._first[number])
        if isinstance(opened, Damage):
            return opened._replace(key=f"number {row}")
        key, places = opened.samples[row]
        found = self._attempt(shard, Span(key, places, opened.size), draw, fresh=False)
        if isinstance(found, Damage):  # a cached copy may be at fault
            return self._attempt(shard, Span(key, places, opened.size), draw, fresh=True)
        return found

    def label(self, index: int) -> tuple[str, int] | Damage:
        """Read key and class label of one sample (-1: no class), or return what is wrong with it; little else is read.

        Raises DataError where the store cannot be read.
        """
        number = self._number(index)
        shard, opened = self._shards[number], self._open(number)
        if isinstance(opened, Damage):
            return opened
        key, places = opened.samples[self._rows[index] - int(self._first[number])]
        try:
            return key, load_label(partial(self._store.read, f"{shard.name}.tar"), Span(key, places, opened.size))
        except DamageError as error:
            return Damage(self._path(shard), key, str(error))

    def flaws(self) -> list[Damage]:
        """Return the flaws of whole shards found since the last call."""
        flaws, self._flaws = self._flaws, []
        return flaws

    def _number(self, index: int) -> int:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return int(np.searchsorted(self._first, self._rows[index], side="right")) - 1

    def _attempt(self, shard: Shard, span: Span, draw: Draw | None, fresh: bool) -> Sample | Damage:
        read = partial(self._store.read, f"{shard.name}.tar", fresh=fresh)
        try:
            return load_sample(read, span, self._specs[shard.bucket], draw)
        except DamageError as error:
            return Damage(self._path(shard), span.key, str(error))

    def _open(self, number: int) -> _Opened | Damage:
        """Return table and actual size of a shard, or what makes all of it unusable."""
        if number not in self._opened:
            while len(self._opened) >= _TABLES:
                del self._opened[next(iter(self._opened))]
            shard = self._shards[number]
            try:
                self._opened[number] = self._inspect(shard)
            except DamageError as error:
                self._opened[number] = Damage(self._path(shard), "", str(error).removeprefix(f"{self._path(shard)}: "))
        return self._opened[number]

    def _inspect(self, shard: Shard) -> _Opened:
        table = read_table(self._store, shard)
        size = self._store.size(f"{shard.name}.tar")
        if size != shard.size:
            flaw = f"shard has {size} bytes, expected {shard.size}"
            self._flaws.append(Damage(self._path(shard), "", flaw))
        elif not ends_in_zeros(self._store, shard, table):
            self._flaws.append(Damage(self._path(shard), "", "the tar is damaged after its last sample"))
        return _Opened(table, size)

    def _path(self, shard: Shard) -> str:
        return f"{self.location}/{shard.name}.tar"

    def __getstate__(self) -> dict[str, object]:
        """Leave out what was read of the shards, so that a worker starts with little memory; it is read again there."""
        return {**self.__dict__, "_opened": {}, "_flaws": []}


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in splits.items())
