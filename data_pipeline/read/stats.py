"""What a prepared folder holds, in figures: from its index, and from a look at some of its samples."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.index import Index
from data_pipeline.read.samples import Sample
from data_pipeline.read.shards import ShardSet


class Spread(NamedTuple):
    """Mean, standard deviation and range of some numbers."""

    mean: float
    std: float
    low: float
    high: float

    def __str__(self) -> str:
        """One line."""
        return f"mean {self.mean:.4g}, std {self.std:.4g}, from {self.low:.4g} to {self.high:.4g}"


class Look(NamedTuple):
    """Figures of some samples."""

    samples: int
    latent: Spread
    tokens: Spread  # of the texts
    saliency: Spread
    foreground: float  # share of samples with a foreground map
    labels: int  # classes that came up; 0 where samples have none
    captions: float  # share of samples whose caption is not empty


def look(samples: Sequence[Sample]) -> Look:
    """Figures of samples."""
    return Look(
        len(samples),
        _spread([sample.latent.astype(np.float32).ravel() for sample in samples]),
        _spread([np.array([len(sample.text)]) for sample in samples]),
        _spread([sample.saliency for sample in samples]),
        sum(sample.foreground is not None for sample in samples) / len(samples),
        len({sample.label for sample in samples} - {-1}),
        sum(bool(sample.caption.strip()) for sample in samples) / len(samples),
    )


def some_samples(shards: ShardSet, count: int) -> list[Sample]:
    """At most `count` samples, evenly spread over a split. Raises DataError where one is damaged."""
    count = min(count, shards.num_samples)
    loaded = [shards.load(number * shards.num_samples // count) for number in range(count)]
    samples = []
    for sample in loaded:
        if not isinstance(sample, Sample):
            raise sample.error()
        samples.append(sample)
    return samples


def describe(location: str, index: Index, looks: dict[str, Look]) -> str:
    """Lay out an index, and a look at some samples of every split."""
    size = sum(shard.size for shard in index.shards)
    count = sum(index.splits.values())
    lines = [
        f"{location}",
        f"  samples    {count} in {len(index.shards)} shards, {size / 2**20:.1f} MiB",
        f"  splits     {', '.join(f'{name} {number}' for name, number in index.splits.items())}",
        f"  left out   {len(index.skipped)} pictures",
        f"  text       {index.text_length} tokens x {index.text_width} at most, pooled {index.pooled_width}",
        f"  codec      {_identity(index.codec)}",
        f"  encoder    {_identity(index.encoder)}",
        f"  source     {_identity(index.source)}",
        f"  {'bucket':<10} {'pixels (H x W)':<16} {'latent (C, h, w)':<18} {'tokens':<10} {'samples':>9} {'share':>7}",
    ]
    for name, bucket in index.buckets.items():
        pixels, tokens = ("{} x {}".format(*pair) for pair in (bucket.image, bucket.grid))
        share = bucket.num_samples / max(count, 1)
        lines.append(
            f"  {name:<10} {pixels:<16} {bucket.latent!s:<18} {tokens:<10} {bucket.num_samples:>9} {share:>7.1%}"
        )
    for split, seen in looks.items():
        lines += [f"  {split}: {line}" for line in _look_lines(seen)]
    return "\n".join(lines)


def _look_lines(seen: Look) -> list[str]:
    return [
        f"a look at {seen.samples} samples",
        f"  latent     {seen.latent}",
        f"  tokens     {seen.tokens}",
        f"  saliency   {seen.saliency}",
        f"  foreground in {seen.foreground:.0%}, captions in {seen.captions:.0%}, {seen.labels} classes",
    ]


def _identity(identity: dict[str, object]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in identity.items() if not isinstance(value, list | dict))
    return text if len(text) <= 100 else text[:99] + "…"


def _spread(parts: Sequence[np.ndarray]) -> Spread:
    values = np.concatenate(parts).astype(np.float64)
    return Spread(float(values.mean()), float(values.std()), float(values.min()), float(values.max()))
