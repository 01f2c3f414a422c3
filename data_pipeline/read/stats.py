"""Statistics of a prepared folder: from its index, and from some of its samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.encode.saliency import saliency_line
from data_pipeline.index import LISTED_SKIPPED, Index
from data_pipeline.read.samples import Sample
from data_pipeline.read.shards import ShardSet


class _Spread(NamedTuple):
    """Mean, standard deviation and range of some numbers."""

    mean: float
    std: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"mean {self.mean:.4g}, std {self.std:.4g}, from {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True, kw_only=True)
class _SampleStats:
    """Statistics of some samples."""

    samples: int
    latent: _Spread
    tokens: _Spread  # of the texts
    saliency: _Spread
    foreground: float  # share of samples with a foreground map
    labels: int  # different classes; 0 where samples have none
    captions: float  # share of samples whose caption is not empty


def sample_stats(samples: Sequence[Sample]) -> _SampleStats:
    """Compute statistics of samples."""
    return _SampleStats(
        samples=len(samples),
        latent=_spread([sample.latent.astype(np.float32).ravel() for sample in samples]),
        tokens=_spread([np.array([len(sample.text)]) for sample in samples]),
        saliency=_spread([sample.saliency for sample in samples]),
        foreground=sum(sample.foreground is not None for sample in samples) / len(samples),
        labels=len({sample.label for sample in samples} - {-1}),
        captions=sum(bool(sample.caption.strip()) for sample in samples) / len(samples),
    )


def some_samples(shards: ShardSet, count: int) -> list[Sample]:
    """Read at most `count` samples, evenly spread over a split. Raises DataError where one is damaged."""
    count = min(count, shards.num_samples)
    loaded = [shards.load(number * shards.num_samples // count) for number in range(count)]
    samples = []
    for sample in loaded:
        if not isinstance(sample, Sample):
            raise sample.error()
        samples.append(sample)
    return samples


def _left_out(listed: int) -> str:
    """Say how many pictures and other files were left out, of which an index names the first ones only."""
    return f"{listed}{' or more' if listed >= LISTED_SKIPPED else ''}{', see skipped.jsonl' if listed else ''}"


def folder_report(location: str, index: Index, stats: dict[str, _SampleStats]) -> str:
    """Format an index and the statistics of some samples of every split, as lines of text."""
    size = sum(shard.size for shard in index.shards)
    count = sum(index.splits.values())
    latent = "latent (C, h, w)" if index.frames == 1 else "latent (C, T, h, w)"
    lines = [
        f"{location}",
        f"  samples    {count} in {len(index.shards)} shards, {size / 2**20:.1f} MiB",
        f"  splits     {', '.join(f'{name} {number}' for name, number in index.splits.items())}",
        f"  left out   {_left_out(len(index.skipped))}",
        f"  text       {index.text_length} tokens x {index.text_width} at most in {index.text_dtype}, pooled "
        f"{index.pooled_width or 'none'}",
        f"  codec      {_identity(index.codec)}",
        f"  encoder    {_identity(index.encoder)}",
        f"  saliency   kind {saliency_line(index.saliency)}",
        f"  source     {_identity(index.source)}",
        *([f"  frames     {index.frames} of each animation"] if index.frames > 1 else []),
        f"  {'bucket':<10} {'pixels (H x W)':<16} {latent:<18} {'tokens':<10} {'samples':>9} {'share':>7}",
    ]
    for name, bucket in index.buckets.items():
        pixels, tokens = (" x ".join(map(str, sizes)) for sizes in (bucket.image, bucket.grid))
        share = bucket.num_samples / max(count, 1)
        lines.append(
            f"  {name:<10} {pixels:<16} {bucket.latent!s:<18} {tokens:<10} {bucket.num_samples:>9} {share:>7.1%}"
        )
    for split, seen in stats.items():
        lines += [f"  {split}: {line}" for line in _stats_lines(seen)]
    return "\n".join(lines)


def _stats_lines(seen: _SampleStats) -> list[str]:
    return [
        f"statistics of {seen.samples} samples",
        f"  latent     {seen.latent}",
        f"  tokens     {seen.tokens}",
        f"  saliency   {seen.saliency}",
        f"  foreground in {seen.foreground:.0%}, captions in {seen.captions:.0%}, {seen.labels} classes",
    ]


def _identity(identity: dict[str, object]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in identity.items() if not isinstance(value, list | dict))
    return text if len(text) <= 100 else text[:99] + "…"


def _spread(parts: Sequence[np.ndarray]) -> _Spread:
    values = np.concatenate(parts).astype(np.float64)
    return _Spread(float(values.mean()), float(values.std()), float(values.min()), float(values.max()))
