"""Several shard sets read as one: with weights, one text length, one codec and one text encoder."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data_pipeline.encode.codecs import Codec
from data_pipeline.identity import check_identity
from data_pipeline.index import Bucket, Identity
from data_pipeline.read.damage import Damage
from data_pipeline.read.samples import Draw, Sample
from data_pipeline.read.shards import ShardSet
from data_pipeline.store.remote import RemoteOptions
from sharpmoe.errors import DataError


class Stream(NamedTuple):
    """The samples of one bucket of one shard set. A stream has an order, and a run counts what it has taken of it."""

    source: int  # which shard set
    bucket: str
    first: int  # index of its first sample in that shard set
    shard_sizes: tuple[int, ...]
    weight: Fraction  # share of the run, before normalisation

    @property
    def num_samples(self) -> int:
        """Number of samples of an epoch."""
        return sum(self.shard_sizes)


class Mixture:
    """The data of a run. Safe in DataLoader workers."""

    sources: tuple[ShardSet, ...]
    streams: tuple[Stream, ...]
    buckets: dict[str, Bucket]  # of all sources
    num_samples: int
    text_length: int
    text_width: int
    pooled_width: int
    patch_size: int
    codec: Identity
    encoder: Identity
    fingerprint: str  # of the only source, or a hash over those of all

    def __init__(self, sources: Sequence[ShardSet], weights: Sequence[float] | None = None) -> None:
        """`weights`: relative frequencies of the sources; by default their sizes.

        Raises DataError where the sources were made with another codec, text encoder, saliency, patch size or number of
        frames.
        """
        first = sources[0]
        self.sources = tuple(sources)
        for other in sources[1:]:
            other.require(first.codec, first.encoder)
            check_identity("saliency", other.location, found=other.saliency, expected=first.saliency)
            for name in ("patch_size", "frames"):
                here, there = getattr(other, name), getattr(first, name)
                if here != there:
                    raise DataError(
                        f"{other.location}: {name} is {here}, {first.location} has {there}; prepare both alike"
                    )
        self.num_samples = sum(source.num_samples for source in sources)
        self.text_length = max(source.text_length for source in sources)
        self.text_width, self.pooled_width, self.patch_size = first.text_width, first.pooled_width, first.patch_size
        self.codec, self.encoder = first.codec, first.encoder
        self.buckets = _all_buckets(sources)
        self.streams = _streams(self.sources, weights or [source.num_samples for source in sources])
        prints = [source.fingerprint for source in sources]
        self.fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()

    def load(self, stream: int, index: int, draw: Draw) -> Sample | Damage:
        """Read a sample of a stream by its index in the stream (see ShardSet.load)."""
        return self.sources[self.streams[stream].source].load(self.streams[stream].first + index, draw)

    def flaws(self) -> list[Damage]:
        """Return the flaws of whole shards found since the last call."""
        return [flaw for source in self.sources for flaw in source.flaws()]

    def codec_object(self) -> Codec:
        """Load the codec of all sources (see ShardSet.codec_object)."""
        return self.sources[0].codec_object()

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the empty caption, padded like the texts of all sources (see ShardSet.empty_text)."""
        return max(self.sources, key=lambda source: source.text_length).empty_text()


def _all_buckets(sources: Sequence[ShardSet]) -> dict[str, Bucket]:
    """Return the buckets of all sources, each with the samples of all."""
    found: dict[str, Bucket] = {}
    for source in sources:
        for name, bucket in source.buckets.items():
            before = found[name].num_samples if name in found else 0
            found[name] = bucket._replace(num_samples=before + bucket.num_samples)
    return found


def open_mixture(
    places: Sequence[tuple[str | Path, float]],
    split: str,
    remote: RemoteOptions | None = None,
    accept_damage: bool = False,
) -> Mixture:
    """Open one shard set, or several with weights (see ShardSet.open and Mixture). Raises DataError."""
    sources = [ShardSet.open(place, split, remote, accept_damage) for place, _ in places]
    return Mixture(sources, [weight for _, weight in places])


def _streams(sources: Sequence[ShardSet], weights: Sequence[float]) -> tuple[Stream, ...]:
    streams = []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        first = 0
        for bucket, sizes in source.bucket_shards.items():
            share = Fraction(weight) * sum(sizes) / source.num_samples
            streams.append(Stream(number, bucket, first, sizes, share))
            first += sum(sizes)
    return tuple(streams)
