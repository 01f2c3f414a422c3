"""Judge sets of samples against a reference set: a table of metrics over features, with the protocol of each figure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.read.shards import ShardSet
from sharpmoe.config_io import nearest
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.adm import classes_of_batch
from sharpmoe.evaluation.captions import read_captions
from sharpmoe.evaluation.extractors import Extractor, ExtractorOptions, Features, open_extractor
from sharpmoe.evaluation.image_sets import ImageSet, Statistics, has_images, open_images, read_statistics
from sharpmoe.evaluation.metrics import METRICS, Figure, JudgedSets, MetricSettings, TextSpace
from sharpmoe.evaluation.text_metrics import CLIP_SCORE_SCALE, fit_caption_map

_FULL = 50_000  # images of FID-50K
# What other tools call a metric -> how it is asked for here.
_ELSEWHERE = {
    "fid": "fd with --extractor inception --extractor-weights FILE (the Inception of pytorch-fid, docs/evaluation.md)",
    "fdd": "fd with --extractor dinov2 --extractor-weights FOLDER",
    "fd_dinov2": "fd with --extractor dinov2 --extractor-weights FOLDER",
    "isc": "is with --extractor inception --extractor-weights FILE (the Inception of pytorch-fid, docs/evaluation.md)",
    "mmd": "kid, or cmmd with --extractor clip",
    "prc": "pr",
    "precision": "pr",
    "recall": "pr",
    "clip": "clipscore with --extractor clip --extractor-weights FOLDER",
    "clip_score": "clipscore with --extractor clip --extractor-weights FOLDER",
}


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """The figures of one set of samples, with what a publication must state."""

    samples: str
    figures: dict[str, Figure]
    protocol: dict[str, Any]

    def save(self, path: Path) -> Path:
        """Write figures and protocol as JSON; undefined errors become null."""
        figures = {
            name: {key: None if math.isnan(part) else part for key, part in figure._asdict().items()}
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
    extractor = open_extractor(options)
    _check_metrics(extractor, settings)
    compared = [name for name in settings.metrics if METRICS[name].of_reference]
    if reference is None and compared:
        raise ConfigError(
            f"--metrics {compared[0]} needs --reference: real images (SET.npz, a folder, SHARDS:SPLIT) or statistics"
        )
    target = _open_reference(reference, extractor, settings.metrics) if reference is not None and compared else None
    _check_classes(places, extractor, settings)
    sets = [open_images(place) for place in places]
    sets = [each._replace(name=name) for each, name in zip(sets, _names(sets, places, names), strict=True)]
    _check_counts([*sets, target] if isinstance(target, ImageSet) else sets, settings)
    captions = [_captions(each, settings) for each in sets]
    space = _text_space(extractor, settings) if any(captions) else None
    if isinstance(target, ImageSet):
        about: dict[str, Any] = {**target.about, "count": target.num_images}
        known: Features | Statistics | None = extract_features(target, extractor, settings.batch_size)
    else:
        about, known = {} if target is None else dict(target.about), target
    shared = _Shared(extractor, known, about, space)
    return [_judge(each, texts, shared, settings) for each, texts in zip(sets, captions, strict=True)]


class _Shared(NamedTuple):
    """What all sets of samples are judged with."""

    extractor: Extractor
    reference: Features | Statistics | None
    about: dict[str, Any]  # of the reference
    space: TextSpace | None


def _captions(samples: ImageSet, settings: MetricSettings) -> tuple[str, ...]:
    """Return the captions of the images that are judged; none where no metric is of captions."""
    if not any(METRICS[name].of_captions for name in settings.metrics):
        return ()
    taken = min(settings.images or samples.num_images, samples.num_images)
    if settings.captions is not None:
        found = read_captions(settings.captions)
        if len(found) != samples.num_images:
            raise DataError(
                f"{settings.captions}: {len(found)} captions for the {samples.num_images} images of {samples.name}; "
                "expected one per line, in the order of the images"
            )
        return found[:taken]
    if samples.captions is None:
        raise ConfigError(f"{samples.name}: has no captions; give --captions FILE, one per line in the order of images")
    return samples.captions()[:taken]


def _text_space(extractor: Extractor, settings: MetricSettings) -> TextSpace:
    """Return the space of an extractor that knows text, or learn one from pairs of prepared shards."""
    if extractor.embed_texts is not None:
        return TextSpace(lambda features: features, extractor.embed_texts)
    if settings.pairs is None:
        raise ConfigError(
            f"--metrics retrieval: {extractor.name} knows no text; give --extractor clip, or --shards FOLDER with "
            "training pairs, from which a linear map to the captions' embeddings is learned"
        )
    shards = ShardSet.open(settings.pairs, "train")
    count = min(settings.most_pairs, len(shards.indices_of(shards.main_bucket)))
    training = open_images(f"{settings.pairs}:train")
    encoder = shards.text_encoder()

    def embed(captions: Sequence[str]) -> Tensor:
        return torch.cat([encoder.encode([caption]).pooled for caption in captions]).float()

    assert training.captions is not None
    features = extract_features(training, extractor, settings.batch_size, count).pool
    learned = fit_caption_map(features, embed(training.captions()[:count]))
    return TextSpace(learned.images, lambda captions: learned.texts(embed(captions)))


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
    statistics = read_statistics(Path(place))
    wanting = [name for name in metrics if METRICS[name].needs_images]
    if statistics is None or ((wanting or not extractor.is_inception) and has_images(Path(place))):
        return open_images(place)
    if not extractor.is_inception:
        raise ConfigError(
            f"--reference {place}: holds statistics of Inception alone, which --extractor {extractor.name} cannot be "
            "compared with; give real images, or --extractor inception"
        )
    if wanting:
        raise ConfigError(
            f"--reference {place}: holds statistics without images, and --metrics {wanting[0]} needs the images; give "
            "real images, or leave it out"
        )
    return statistics


def _judge(samples: ImageSet, captions: tuple[str, ...], shared: _Shared, settings: MetricSettings) -> SampleFigures:
    extractor = shared.extractor
    taken = min(settings.images or samples.num_images, samples.num_images)
    features = extract_features(samples, extractor, settings.batch_size, taken)
    sets = JudgedSets(shared.reference, features, captions, shared.space)
    figures: dict[str, Figure] = {}
    for name in settings.metrics:
        figures.update(METRICS[name].compute(sets, settings))
    protocol: dict[str, Any] = {
        "name": _figure_name(extractor, taken),
        "samples": {**samples.about, "count": taken},
        "reference": dict(shared.about),
        "extractor": {"name": extractor.name, **extractor.about},
        "kid": {"subsets": settings.subsets, "subset_size": settings.subset_size, "seed": settings.seed},
        "bootstrap": settings.bootstrap,
    }
    if captions:
        protocol["captions"] = _about_captions(captions, extractor, settings)
    return SampleFigures(
        samples=samples.name,
        figures={full_name(name, extractor): figure for name, figure in figures.items()},
        protocol=protocol,
    )


def _about_captions(captions: Sequence[str], extractor: Extractor, settings: MetricSettings) -> dict[str, Any]:
    about: dict[str, Any] = {"count": len(captions), "different": len(set(captions))}
    if "clipscore" in settings.metrics:
        about["clipscore"] = f"{CLIP_SCORE_SCALE} x max(cos, 0), {extractor.name}, prefix {settings.caption_prefix!r}"
    if "retrieval" in settings.metrics:
        space = "its text tower" if extractor.embed_texts else f"a linear map from {settings.most_pairs} pairs at most"
        about["retrieval"] = f"among the different captions, {extractor.name} with {space}"
    return about


def figures_table(found: Sequence[SampleFigures]) -> str:
    """Return figures as a table, one line per figure and one column per set, and the protocol's name below."""
    width = max(14, *(len(each.samples) + 2 for each in found))
    width = max(width, *(len(_shown(figure)) + 2 for each in found for figure in each.figures.values()))
    head = max(12, *(len(name) + 2 for each in found for name in each.figures))
    lines = [f"{'':{head}}" + "".join(f"{each.samples:>{width}}" for each in found)]
    for name in dict.fromkeys(name for each in found for name in each.figures):
        values = [_shown(each.figures[name]) if name in each.figures else "" for each in found]
        lines.append(f"{name:{head}}" + "".join(f"{value:>{width}}" for value in values))
    about = [found[0].protocol.get("captions", {}).get(kind) for kind in ("clipscore", "retrieval")]
    names = dict.fromkeys(
        each.protocol["name"] for each in found if "captions" not in each.protocol or each.protocol["reference"]
    )
    return "\n".join([*lines, *names, *(text for text in about if text)])


def _shown(figure: Figure) -> str:
    error = "" if math.isnan(figure.error) else f" ± {figure.error:.2g}"
    return f"{figure.value:.4g}{error}" + ("" if math.isnan(figure.chance) else f" (chance {figure.chance:.2g})")


def _check_metrics(extractor: Extractor, settings: MetricSettings) -> None:
    """Raise ConfigError for an unknown metric, and for one that this extractor does not have."""
    for name in settings.metrics:
        if name not in METRICS:
            hint = f"; here it is: {_ELSEWHERE[name]}" if name in _ELSEWHERE else nearest(name, METRICS)
            raise ConfigError(f"--metrics {name}: expected some of {', '.join(METRICS)}{hint}")
        if METRICS[name].of_inception and not extractor.is_inception:
            raise ConfigError(f"--metrics {name} is defined with --extractor inception, got {extractor.name}")
        if METRICS[name].of_classes and extractor.num_classes is None:
            raise ConfigError(
                f"--metrics {name} needs --extractor classifier, got {extractor.name}: it knows no classes"
            )
        if METRICS[name].of_captions and extractor.embed_texts is None and not METRICS[name].maps_captions:
            raise ConfigError(f"--metrics {name} needs --extractor clip, got {extractor.name}: it knows no text")


def _check_classes(places: Sequence[str], extractor: Extractor, settings: MetricSettings) -> None:
    """Raise ConfigError where a batch was drawn of other classes than the extractor knows, which would misjudge it."""
    for name in settings.metrics:
        for place in places if METRICS[name].of_classes else ():
            drawn = classes_of_batch(Path(place))
            if drawn not in (None, extractor.num_classes):
                raise ConfigError(
                    f"--metrics {name}: {place} was drawn of {drawn} classes, {extractor.name} knows "
                    f"{extractor.num_classes}; give a classifier of the data that the model was trained on, or leave "
                    f"{name} out"
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


def full_name(name: str, extractor: Extractor) -> str:
    """Return the name of a figure: a Frechet distance is FID with Inception's features alone."""
    return "fid" if name == "fd" and extractor.is_inception else name


def _figure_name(extractor: Extractor, count: int) -> str:
    if extractor.is_inception:
        return "FID-50K" if count == _FULL else f"FID of {count} images, not FID-50K"
    return f"FD, {extractor.name}, {count} images"
