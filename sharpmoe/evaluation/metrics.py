"""Figures of a set of samples: a table of metrics over features of an extractor.

To add one, write a function of the features that returns its figures and add a row to METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpmoe.evaluation import distances
from sharpmoe.evaluation.distances import Gaussian
from sharpmoe.evaluation.extractors import Features
from sharpmoe.evaluation.text_metrics import caption_ranks, clip_score


class Figure(NamedTuple):
    """One value; `error` is a standard deviation over subsets, splits or bootstrap draws, NaN where there is none."""

    value: float
    error: float = math.nan
    chance: float = math.nan  # what a model that ignores captions would reach, where that is known


class TextSpace(NamedTuple):
    """Where images and captions can be compared."""

    images: Callable[[Tensor], Tensor]  # features (N, D) -> (N, E)
    texts: Callable[[Sequence[str]], Tensor]  # captions (M) -> (M, E)


class JudgedSets(NamedTuple):
    """Features of the reference and of the samples."""

    reference: Any  # Features or Statistics, None without a reference; `_check_metrics` has refused what does not fit
    samples: Features
    captions: tuple[str, ...] = ()  # of the samples, where a metric is of captions
    space: TextSpace | None = None
    labels: Tensor | None = None  # (M,) of the samples; None: image i has class i mod K, as `adm` draws them


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of METRICS."""

    compute: Callable[[JudgedSets, MetricSettings], Mapping[str, Figure]]
    needs_images: bool = True  # of the reference; False: its statistics are enough, or it needs none
    of_inception: bool = False  # defined with Inception's outputs only
    of_classes: bool = False  # needs an extractor that knows the classes of the samples
    of_reference: bool = True  # False: of the samples alone
    of_captions: bool = False  # needs captions of the samples, and an extractor that knows text
    maps_captions: bool = False  # an extractor without text will do, with a map learned from training pairs
    fewest: int = 2  # images of each set: a covariance, or an unbiased mean over pairs, needs two


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """How figures are computed."""

    metrics: tuple[str, ...] = ("fd", "kid", "pr")
    batch_size: int = 64  # images per call of the extractor
    images: int | None = None  # the first so many samples; None: all
    bootstrap: int = 0  # draws of the samples for the error of a Frechet distance; 0: none
    subset_size: int = 1000  # of KID
    subsets: int = 100
    seed: int = 2020  # of subsets and draws; torch-fidelity's
    caption_prefix: str = "A photo depicts"  # of CLIPScore, before every caption; the paper's
    captions: Path | None = None  # of the samples, one per line; None: those that a set has
    pairs: Path | str | None = None  # shards whose training split teaches an extractor without text what captions mean
    most_pairs: int = 2000


def _frechet(part: str, name: str) -> Callable[[JudgedSets, MetricSettings], Mapping[str, Figure]]:
    """Return the Frechet distance in one output of the extractor."""

    def compute(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
        reference, samples = getattr(sets.reference, part), getattr(sets.samples, part)
        target = reference if isinstance(reference, Gaussian) else Gaussian.of(reference)
        value = distances.frechet_distance(target, Gaussian.of(samples))
        generator = torch.Generator().manual_seed(settings.seed)
        drawn = [
            distances.frechet_distance(
                target, Gaussian.of(samples[torch.randint(len(samples), (len(samples),), generator=generator)])
            )
            for _ in range(settings.bootstrap)
        ]
        return {name: Figure(value, float(torch.tensor(drawn).std()) if len(drawn) > 1 else math.nan)}

    return compute


def _kernel(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    found = distances.kernel_distance(
        sets.reference.pool,
        sets.samples.pool,
        subsets=settings.subsets,
        subset_size=settings.subset_size,
        seed=settings.seed,
    )
    return {"kid": Figure(found.mean, found.deviation / math.sqrt(settings.subsets))}


def _coverage(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    found = distances.precision_recall(sets.reference.pool, sets.samples.pool)
    return {"precision": Figure(found.precision), "recall": Figure(found.recall)}


def _inception_score(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    assert sets.samples.logits is not None
    return {"is": Figure(*distances.inception_score(sets.samples.logits))}


def _gaussian_mmd(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    return {"cmmd": Figure(distances.gaussian_mmd(sets.reference.pool, sets.samples.pool))}


def _accuracy(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    """Share of class-conditional samples that have their class."""
    assert sets.samples.logits is not None
    asked = torch.arange(len(sets.samples.logits)) % sets.samples.logits.shape[1]
    asked = asked if sets.labels is None else sets.labels
    hits = (sets.samples.logits.argmax(1) == asked).double()
    return {"accuracy": Figure(float(hits.mean()), float(hits.std() / math.sqrt(len(hits))))}


def _clip_score(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    """Mean over the images; the error is the standard error of that mean."""
    assert sets.space is not None
    prefix = f"{settings.caption_prefix} " if settings.caption_prefix else ""
    texts = sets.space.texts([prefix + caption for caption in sets.captions])
    scores = clip_score(sets.space.images(sets.samples.pool), texts)
    return {"clipscore": Figure(float(scores.mean()), _standard_error(scores))}


def _retrieval(sets: JudgedSets, settings: MetricSettings) -> Mapping[str, Figure]:
    """Share of the images whose own caption is among the 1, 5 or 10 nearest of all different captions."""
    assert sets.space is not None
    different = list(dict.fromkeys(sets.captions))
    number = {caption: place for place, caption in enumerate(different)}
    own = [number[caption] for caption in sets.captions]
    ranks = caption_ranks(sets.space.images(sets.samples.pool), sets.space.texts(different), own)
    return {
        f"R@{count}": Figure(
            float((ranks < count).double().mean()),
            _standard_error((ranks < count).double()),
            min(count / len(different), 1.0),
        )
        for count in (1, 5, 10)
    }


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


METRICS: dict[str, Metric] = {
    "fd": Metric(compute=_frechet("pool", "fd"), needs_images=False),
    "sfid": Metric(compute=_frechet("spatial", "sfid"), needs_images=False, of_inception=True),
    "is": Metric(compute=_inception_score, needs_images=False, of_inception=True, of_reference=False, fewest=1),
    "kid": Metric(compute=_kernel),
    "pr": Metric(compute=_coverage, fewest=4),
    "cmmd": Metric(compute=_gaussian_mmd, fewest=1),
    "accuracy": Metric(compute=_accuracy, needs_images=False, of_classes=True, of_reference=False, fewest=1),
    "clipscore": Metric(compute=_clip_score, needs_images=False, of_captions=True, of_reference=False, fewest=1),
    "retrieval": Metric(
        compute=_retrieval, needs_images=False, of_captions=True, of_reference=False, maps_captions=True, fewest=1
    ),
}
