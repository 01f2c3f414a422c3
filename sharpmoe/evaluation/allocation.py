"""Expert allocation: do salient tokens get more experts than others, and at which noise level?

SharpMoE (arXiv 2606.26938) plots experts per token against saliency. Here this is a rank correlation per range of t,
with standard errors over images, reported together with the total compute and the flow loss, so that a model that
spends more or denoises worse does not look better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import ALONE, Observed, Samples, Share, TokenTables, observe, spread
from sharpmoe.evaluation.statistics import Interval, interval_over_images
from sharpmoe.flow import TIME_RANGES
from sharpmoe.invocation import spell_command
from sharpmoe.model.backbone import Backbone
from sharpmoe.moe.influence import influence_figures

ALLOCATION_TIMES = tuple(round(0.999 - k * (0.999 - 0.05) / 9, 6) for k in range(10))
ALLOCATION_RANGES: dict[str, tuple[float, float]] = {**TIME_RANGES, "all t": (0.0, 1.0)}  # lower < t <= upper
NUM_FIFTHS = 5
_BY_RANGE = ("saliency", "foreground", "experts", "flow", "flow_markov")  # fields of `Allocation` by range of t
_REQUIRED = ("saliency", "foreground", "experts", "flow")  # in the files of earlier versions too
IMAGE_PARTS = (
    "least salient 5th",
    "2nd fifth",
    "3rd fifth",
    "4th fifth",
    "most salient 5th",
    "foreground",
    "background",
)

_Strength = dict[str, dict[str, dict[str, float]]]  # "layer<n>" or "all" -> range of t -> `influence_figures`


class ImageMean(NamedTuple):
    """A mean over images with its standard error. NaN where no image has a value."""

    mean: float
    error: float  # standard error over images
    images: int  # images that have a value


UNKNOWN_MEAN = ImageMean(math.nan, math.nan, 0)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Allocation of one model on held-out images. Keys of the inner dicts are ranges of t unless noted."""

    saliency: dict[str, ImageMean]  # Spearman correlation of experts per token with saliency M
    foreground: dict[str, ImageMean]  # the same with the foreground mask, over images that have one
    saliency_by_time: dict[float, ImageMean]  # Spearman correlation with M, by single time
    experts: dict[str, ImageMean]  # mean experts per token, MoE layer and step: the compute spent
    experts_by_saliency: dict[str, tuple[ImageMean, ...]]  # the same by quantile of M, least salient fifth first
    flow: dict[str, ImageMean]  # flow loss
    flow_markov: dict[str, ImageMean]  # with the noise of a Markov chain; empty where it was not measured
    flow_parts: dict[
        str, dict[str, ImageMean]
    ]  # by part of an image (IMAGE_PARTS), then by range: flow loss of its tokens
    strength: _Strength  # of the saliency routers, by MoE layer and of all
    constant: dict[str, int]  # images left out of `saliency`: all tokens equal in experts or in M
    per_image: dict[str, dict[str, tuple[float, ...]]]  # values of saliency, ..., flow, and "flow, <part>"
    images: int
    times: tuple[float, ...]
    split: str = ""  # that the images are of, such as "unseen:2/2"; "" where it is not known
    dtype: str = "float32"  # of the model's parameters while it was measured

    def save(self, path: Path | str) -> Path:
        """Write the result as JSON, creating its folder; undefined figures become null."""
        path = Path(path)
        write_atomically(path, json.dumps(_plain(self), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path | str) -> Allocation:
        """Read a file of `save`. Raises DataError where it is missing or holds something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                **{
                    what: _read_ranges(content[what] if what in _REQUIRED else content.get(what, {}))
                    for what in _BY_RANGE
                },
                flow_parts={part: _read_ranges(ranges) for part, ranges in content.get("flow_parts", {}).items()},
                strength=content.get("strength", {}),
                saliency_by_time={float(t): _read_image_mean(e) for t, e in content["saliency_by_time"].items()},
                experts_by_saliency={
                    name: tuple(_read_image_mean(e) for e in row)
                    for name, row in content["experts_by_saliency"].items()
                },
                constant=content["constant"],
                per_image={
                    what: {name: tuple(_or_nan(v) for v in row) for name, row in ranges.items()}
                    for what, ranges in content["per_image"].items()
                },
                images=content["images"],
                times=tuple(content["times"]),
                split=content.get("split", ""),
                dtype=content.get("dtype", "float32"),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not an allocation result ({error}); run `{spell_command('evaluate')}` again"
            ) from None

    def is_comparable(self, other: Allocation) -> bool:
        """Whether two models were measured on the same images and in one precision, as far as it is known."""
        splits = {self.split, other.split} - {""}
        return self.images == other.images and len(splits) < 2 and self.dtype == other.dtype

    def scalars(self) -> dict[str, float]:
        """Return the main figures under the tags of the log, allocation_<what>/<range>, without undefined ones."""
        named = {f"allocation_{what}/{name}": e.mean for what in _BY_RANGE for name, e in getattr(self, what).items()}
        return {name.replace(" ", ""): value for name, value in named.items() if not math.isnan(value)}


def measure_allocation(
    model: Backbone,
    samples: Samples,
    *,
    images: int = 128,
    seed: int = 0,
    chunk: int = 16,
    share: Share = ALONE,
    with_markov_noise: bool = False,
) -> Allocation:
    """Roll the model out over held-out samples at ten fixed times from 0.999 to 0.05 and return its allocation.

    The times are evenly spaced and not shifted, whatever `rollout.shift` is: all models are measured at the same.

    Eval mode, fixed noise, captions kept. with_markov_noise: roll out a second time for the flow loss with the noise
    of a Markov chain (`flow.markov_noise`). Communicates only through `share.reduce`; the result is the same on every
    rank.
    """
    indices, times = spread(samples.num_samples, images), ALLOCATION_TIMES
    observed = observe(model, samples, indices, times, seed=seed, chunk=chunk, share=share)
    found = _summarise(observed, times, num_layers=len(model.moe_layers()), steered=model.config.saliency_router)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    found = replace(found, split=getattr(samples, "split", ""), dtype=dtype)
    if not with_markov_noise:
        return found
    markov = observe(model, samples, indices, times, seed=seed, chunk=chunk, share=share, noise="markov")
    flow = _by_range(markov.flow, times)
    return replace(
        found,
        flow_markov={name: _image_mean(value) for name, value in flow.items()},
        per_image=found.per_image | {"flow_markov": {name: tuple(value.tolist()) for name, value in flow.items()}},
    )


def steps_of_range(times: Sequence[float], name: str) -> list[int]:
    """Return the indices of the times in a range of t of the table, such as "t > 0.65" or "all t"."""
    lower, upper = ALLOCATION_RANGES[name]
    return [step for step, t in enumerate(times) if lower < t <= upper]


def _summarise(observed: Observed, times: Sequence[float], num_layers: int, steered: bool = True) -> Allocation:
    """Return the allocation in observed rollouts of a model with `num_layers` MoE layers; steered: by saliency routers.

    Correlations and fifths are of the tokens of one image, so that images of any resolution can be averaged.
    """
    parts = [_per_image(tables, times, num_layers) for tables in observed.tokens]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    values = {
        what: {name: joined[what, name] for name in ALLOCATION_RANGES} for what in ("saliency", "foreground", "experts")
    }
    values["flow"] = _by_range(observed.flow, times)
    means: dict[str, Any] = {
        what: {name: _image_mean(value) for name, value in ranges.items()} for what, ranges in values.items()
    }
    of_parts = {
        part: {name: joined["flow", name][:, k] for name in ALLOCATION_RANGES} for k, part in enumerate(IMAGE_PARTS)
    }
    return Allocation(
        **means,
        flow_markov={},
        flow_parts={part: {name: _image_mean(v) for name, v in ranges.items()} for part, ranges in of_parts.items()},
        strength=_strength(observed, times, steered),
        saliency_by_time={t: _image_mean(joined["saliency", t]) for t in times},
        experts_by_saliency={
            name: tuple(_image_mean(column) for column in joined["fifths", name].T) for name in ALLOCATION_RANGES
        },
        constant={name: int(value.isnan().sum()) for name, value in values["saliency"].items()},
        per_image={
            what: {name: tuple(value.tolist()) for name, value in ranges.items()}
            for what, ranges in (values | {flow_of_part(part): ranges for part, ranges in of_parts.items()}).items()
        },
        images=len(observed.flow),
        times=tuple(times),
    )


def _per_image(seen: TokenTables, times: Sequence[float], num_layers: int) -> dict[tuple[str, str | float], Tensor]:
    """Return figures (I,) of images of one resolution by (what, range of t), and ("saliency", t).

    Fifths are (I, 5), the flow loss of `IMAGE_PARTS` is (I, 7).
    """
    figures: dict[tuple[str, str | float], Tensor] = {}
    for name in ALLOCATION_RANGES:
        steps = steps_of_range(times, name)
        total = seen.experts[:, steps].sum(1)
        mean = total / max(len(steps) * num_layers, 1)
        figures["saliency", name] = _spearman(total, seen.saliency)
        figures["foreground", name] = _spearman(total, seen.foreground)
        figures["experts", name] = mean.mean(1)
        figures["fifths", name] = _by_quantile(mean, seen.saliency)
        figures["flow", name] = _of_parts(seen.flow[:, steps].mean(1), seen)
    return figures | {("saliency", t): _spearman(seen.experts[:, k], seen.saliency) for k, t in enumerate(times)}


def _of_parts(flow: Tensor, seen: TokenTables) -> Tensor:
    """Return means (I, 7) of the flow losses (I, N) of tokens over `IMAGE_PARTS`; NaN for a part without tokens."""
    weights = torch.stack([seen.foreground, 1 - seen.foreground], -1).double()  # (I, N, 2), NaN without a mask
    sums = weights.sum(1)
    by_mask = torch.einsum("in,inq->iq", flow.double(), weights) / torch.where(sums > 0, sums, torch.nan)
    return torch.cat([_by_quantile(flow, seen.saliency), by_mask], 1)


def flow_of_part(part: str) -> str:
    """Return the key of a part's flow loss in `Allocation.per_image`."""
    return f"flow, {part}"


def _by_range(flow: Tensor, times: Sequence[float]) -> dict[str, Tensor]:
    """Return the mean (I,) of figures (I, T) over each range of t."""
    return {name: flow[:, steps_of_range(times, name)].mean(1) for name in ALLOCATION_RANGES}


def _strength(observed: Observed, times: Sequence[float], steered: bool) -> _Strength:
    """Return what the saliency routers decide; without them, only whether experts follow saliency."""
    found: _Strength = {}
    for name in ALLOCATION_RANGES:
        by_layer = observed.influence[:, steps_of_range(times, name)].double().sum((0, 1))  # (L, 6)
        rows = {f"layer{layer}": row for layer, row in enumerate(by_layer)} | {"all": by_layer.sum(0)}
        for layer, row in rows.items():
            figures = influence_figures(row.tolist())
            kept = figures if steered else {what: value for what, value in figures.items() if what == "agreement"}
            found.setdefault(layer, {})[name] = kept
    return found


def paired_change(before: Allocation, after: Allocation, what: str, name: str) -> ImageMean:
    """Return the mean change of one figure per image; its error is smaller than that of a difference of two means."""
    known = [result.per_image.get(what, {}).get(name, ()) for result in (before, after)]
    if not all(known):
        return UNKNOWN_MEAN
    pair = [torch.tensor(values, dtype=torch.float64) for values in known]
    return _image_mean(pair[1] - pair[0])


def paired_interval(before: Allocation, after: Allocation, what: str, name: str) -> Interval:
    """Return the mean change of one figure per image with its 95 % interval over images; unknown without pairs.

    Results of other images (another number or split) or precision, or without values per image, have no pairs.
    """
    known = [result.per_image.get(what, {}).get(name, ()) for result in (before, after)]
    if len(known[0]) != len(known[1]) or not before.is_comparable(after):
        return interval_over_images(())
    return interval_over_images([b - a for a, b in zip(*known, strict=True)])


def _average_ranks(values: Tensor) -> Tensor:
    """Return the ranks 1..N of each row (I, N), equal values sharing the mean of their ranks; float64."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to + 1).double() / 2


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation (I,) float64 of rows of a and b (I, N); NaN where one is constant or has NaN."""
    ranks = [_average_ranks(values) for values in (a, b)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    known = (norm > 0) & ~a.isnan().any(1) & ~b.isnan().any(1)
    return torch.where(known, (centred[0] * centred[1]).sum(1) / norm, torch.nan)


def _image_mean(values: Tensor) -> ImageMean:
    """Return mean and standard error of the values (I,) that are not NaN."""
    known = values.double()[~values.isnan()]
    if not len(known):
        return ImageMean(math.nan, math.nan, 0)
    error = (known.std() / len(known) ** 0.5).item() if len(known) > 1 else math.nan
    return ImageMean(known.mean().item(), error, len(known))


def _by_quantile(values: Tensor, saliency: Tensor) -> Tensor:
    """Return means (I, 5) of values (I, N) over each fifth of tokens by saliency; NaN where ties leave one empty."""
    num_tokens = saliency.shape[1]
    bins = ((_average_ranks(saliency) - 0.5) / num_tokens * NUM_FIFTHS).long()
    members = torch.nn.functional.one_hot(bins, NUM_FIFTHS).double()  # (I, N, 5)
    return torch.einsum("in,inq->iq", values.double(), members) / members.sum(1)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _read_image_mean(entry: Mapping[str, float | None]) -> ImageMean:
    return ImageMean(_or_nan(entry["mean"]), _or_nan(entry["error"]), int(entry["images"] or 0))


def _read_ranges(entries: Mapping[str, Mapping[str, float | None]]) -> dict[str, ImageMean]:
    return {name: _read_image_mean(entry) for name, entry in entries.items()}


def _plain(value: object) -> object:
    """Convert records to dicts and NaN to None, recursively."""
    if isinstance(value, Allocation):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, ImageMean):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
