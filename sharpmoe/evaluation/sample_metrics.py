"""Judge sets of samples against a reference set: a table of metrics over features, with the protocol of each figure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation import distances
from sharpmoe.evaluation.distances import Gaussian
from sharpmoe.evaluation.extractors import Extractor, ExtractorOptions, Features, open_extractor
from sharpmoe.evaluation.image_sets import ImageSet, Statistics, open_images, read_statistics

_FULL = 50_000  # images of FID-50K


class Figure(NamedTuple):
    """One value; `error` is a standard deviation over subsets, splits or bootstrap draws, NaN where there is none."""

    value: float
    error: float = math.nan


class _Sets(NamedTuple):
    """Features of the reference and of the samples."""

    reference: Any  # Features or Statistics; `check_metrics` has refused what a metric cannot read
    samples: Features


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of METRICS."""

    compute: Callable[[_Sets, MetricSettings], Mapping[str, Figure]]
    needs_images: bool = True  # of the reference; False: its statistics are enough, or it needs none
    of_inception: bool = False  # defined with Inception's outputs only
    of_classes: bool = False  # needs an extractor that knows the classes of the samples
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


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """The figures of one set of samples, with what a publication must state."""

    samples: str
    figures: dict[str, Figure]
    protocol: dict[str, Any]

    def save(self, path: Path) -> Path:
        """Write figures and protocol as JSON; undefined errors become null."""
        figures = {
            name: {"value": figure.value, "error": None if math.isnan(figure.error) else figure.error}
            for name, figure in self.figures.items()
        }
        content = {"samples": self.samples, "figures": figures, "protocol": self.protocol}
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        return path


def judge_sets(
    places: Sequence[str],
    reference: str | None,
    options: ExtractorOptions,
    settings: MetricSettings,
    names: Sequence[str] | None = None,
) -> list[SampleFigures]:
    """Judge several sets of samples against one reference, whose features are computed once.

    Places as `open_images` takes them; the reference may also be an .npz of statistics, which are used where they are
    Inception's and no metric needs the images. `names`: what the sets are called; without, the names of their places.
    Raises ConfigError where a metric does not apply or a set has too few images for it, DataError for a place that is
    no set of images; all places are opened before any image is read.
    """
    if reference is None:
        raise ConfigError("--metrics needs --reference: real images (SET.npz, a folder, SHARDS:SPLIT) or statistics")
    extractor = open_extractor(options)
    _check_metrics(extractor, settings.metrics)
    target = _open_reference(reference, extractor, settings.metrics)
    sets = [open_images(place) for place in places]
    sets = [each._replace(name=name) for each, name in zip(sets, _names(sets, places, names), strict=True)]
    _check_counts([*sets, target] if isinstance(target, ImageSet) else sets, settings)
    if isinstance(target, ImageSet):
        about: dict[str, Any] = {**target.about, "count": target.num_images}
        known: Features | Statistics = extract_features(target, extractor, settings.batch_size)
    else:
        about, known = dict(target.about), target
    return [_judge(samples, known, about, extractor, settings) for samples in sets]


def _names(sets: Sequence[ImageSet], places: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Return a name of its own for every set: the given ones, or FOLDER/NAME where several sets are called NAME."""
    if given is not None:
        if len(given) != len(sets) or len(set(given)) < len(given):
            raise ConfigError(f"--names {' '.join(given)}: expected {len(sets)} different names, one for every set")
        return list(given)
    count = Counter(each.name for each in sets)
    found = [
        each.name if count[each.name] == 1 else f"{Path(place).resolve().parent.name}/{each.name}"
        for each, place in zip(sets, places, strict=True)
    ]
    if len(set(found)) < len(found):
        raise ConfigError(f"{', '.join(places)}: several sets have one name; give names of their own with --names")
    return found


def _check_counts(sets: Sequence[ImageSet], settings: MetricSettings) -> None:
    """Raise ConfigError where a set has fewer images than a metric needs."""
    for each in sets:
        count = min(settings.images or each.num_images, each.num_images)
        for name in settings.metrics:
            if count < METRICS[name].fewest:
                raise ConfigError(
                    f"--metrics {name}: {each.name} has {count} images, expected {METRICS[name].fewest} or more"
                )


def _open_reference(place: str, extractor: Extractor, metrics: Sequence[str]) -> ImageSet | Statistics:
    statistics = read_statistics(Path(place)) if extractor.is_inception else None
    if statistics is None or any(METRICS[name].needs_images for name in metrics):
        return open_images(place)
    return statistics


def _judge(
    samples: ImageSet,
    target: Features | Statistics,
    about: Mapping[str, Any],
    extractor: Extractor,
    settings: MetricSettings,
) -> SampleFigures:
    taken = min(settings.images or samples.num_images, samples.num_images)
    sets = _Sets(target, extract_features(samples, extractor, settings.batch_size, taken))
    figures: dict[str, Figure] = {}
    for name in settings.metrics:
        figures.update(METRICS[name].compute(sets, settings))
    return SampleFigures(
        samples=samples.name,
        figures={_full_name(name, extractor): figure for name, figure in figures.items()},
        protocol={
            "name": _figure_name(extractor, taken),
            "samples": {**samples.about, "count": taken},
            "reference": dict(about),
            "extractor": {"name": extractor.name, **extractor.about},
            "kid": {"subsets": settings.subsets, "subset_size": settings.subset_size, "seed": settings.seed},
            "bootstrap": settings.bootstrap,
        },
    )


def figures_table(found: Sequence[SampleFigures]) -> str:
    """Return figures as a table, one line per figure and one column per set, and the protocol's name below."""
    width = max(14, *(len(each.samples) + 2 for each in found))
    lines = [f"{'':12}" + "".join(f"{each.samples:>{width}}" for each in found)]
    for name in found[0].figures:
        values = [_shown(each.figures[name]) for each in found]
        lines.append(f"{name:12}" + "".join(f"{value:>{width}}" for value in values))
    return "\n".join([*lines, *dict.fromkeys(each.protocol["name"] for each in found)])


def _shown(figure: Figure) -> str:
    return f"{figure.value:.4g}" + ("" if math.isnan(figure.error) else f" ± {figure.error:.2g}")


def _check_metrics(extractor: Extractor, metrics: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric, and for one that this extractor does not have."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"--metrics {name}: expected some of {', '.join(METRICS)}")
        if METRICS[name].of_inception and not extractor.is_inception:
            raise ConfigError(f"--metrics {name} is defined with --extractor inception, got {extractor.name}")
        if METRICS[name].of_classes and extractor.num_classes is None:
            raise ConfigError(
                f"--metrics {name} needs --extractor classifier, got {extractor.name}: it knows no classes"
            )


def extract_features(images: ImageSet, extractor: Extractor, batch_size: int, count: int | None = None) -> Features:
    """Return the features of the first `count` images, in float32 on the host."""
    parts: list[Features] = []
    for batch in _first(images.batches(batch_size), count or images.num_images):
        found = extractor.compute(batch)
        parts.append(Features(found.pool.float().cpu(), _on_host(found.spatial), _on_host(found.logits)))
    return Features(
        torch.cat([part.pool for part in parts]),
        _joined([part.spatial for part in parts]),
        _joined([part.logits for part in parts]),
    )


def _on_host(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float().cpu()


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _first(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _frechet(part: str, name: str) -> Callable[[_Sets, MetricSettings], Mapping[str, Figure]]:
    """Return the Frechet distance in one output of the extractor."""

    def compute(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
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


def _kernel(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
    found = distances.kernel_distance(
        sets.reference.pool,
        sets.samples.pool,
        subsets=settings.subsets,
        subset_size=settings.subset_size,
        seed=settings.seed,
    )
    return {"kid": Figure(found.mean, found.deviation / math.sqrt(settings.subsets))}


def _coverage(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
    found = distances.precision_recall(sets.reference.pool, sets.samples.pool)
    return {"precision": Figure(found.precision), "recall": Figure(found.recall)}


def _inception_score(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
    assert sets.samples.logits is not None
    return {"is": Figure(*distances.inception_score(sets.samples.logits))}


def _gaussian_mmd(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
    return {"cmmd": Figure(distances.gaussian_mmd(sets.reference.pool, sets.samples.pool))}


def _accuracy(sets: _Sets, settings: MetricSettings) -> Mapping[str, Figure]:
    """Share of class-conditional samples that have their class: image i has class i mod K, as `adm` draws them."""
    assert sets.samples.logits is not None
    asked = torch.arange(len(sets.samples.logits)) % sets.samples.logits.shape[1]
    hits = (sets.samples.logits.argmax(1) == asked).double()
    return {"accuracy": Figure(float(hits.mean()), float(hits.std() / math.sqrt(len(hits))))}


METRICS: dict[str, Metric] = {
    "fd": Metric(compute=_frechet("pool", "fd"), needs_images=False),
    "sfid": Metric(compute=_frechet("spatial", "sfid"), needs_images=False, of_inception=True),
    "is": Metric(compute=_inception_score, needs_images=False, of_inception=True, fewest=1),
    "kid": Metric(compute=_kernel),
    "pr": Metric(compute=_coverage, fewest=4),
    "cmmd": Metric(compute=_gaussian_mmd, fewest=1),
    "accuracy": Metric(compute=_accuracy, needs_images=False, of_classes=True, fewest=1),
}


def _full_name(name: str, extractor: Extractor) -> str:
    """Return the name of a figure: a Frechet distance is FID with Inception's features alone."""
    return "fid" if name == "fd" and extractor.is_inception else name


def _figure_name(extractor: Extractor, count: int) -> str:
    if extractor.is_inception:
        return "FID-50K" if count == _FULL else f"FID of {count} images, not FID-50K"
    return f"FD, {extractor.name}, {count} images"
