"""Where a model spends its experts: do salient tokens get more compute than others, and at which noise?

SharpMoE (arXiv 2606.26938) shows experts per token against saliency; here the same as rank correlations per range of t
with standard errors over images, beside the total compute and the flow loss, so that a model cannot look better by
spending more or by denoising worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import ALONE, Observed, Samples, Share, observe, spread
from sharpmoe.model.dit import DiT

ALLOCATION_TIMES = tuple(round(0.999 - k * (0.999 - 0.05) / 9, 6) for k in range(10))
RANGES: dict[str, tuple[float, float]] = {  # lower < t <= upper
    "t > 0.65": (0.65, 1.0),
    "t 0.35-0.65": (0.35, 0.65),
    "t < 0.35": (0.0, 0.35),
    "all t": (0.0, 1.0),
}
NUM_BINS = 5
FIFTHS = ("all t: least salient 5th", "2nd fifth", "3rd fifth", "4th fifth", "most salient 5th")
TITLES = {
    "saliency": "Spearman, experts per token with saliency M",
    "foreground": "Spearman, experts per token with the foreground mask",
    "experts": "experts per token, MoE layer and step: total compute",
    "flow": "flow loss",
}


class Estimate(NamedTuple):
    """A mean over images. NaN where no image has a value."""

    mean: float
    error: float  # standard error over images
    images: int  # images that have a value


class Allocation(NamedTuple):
    """Allocation of one model on held-out images."""

    saliency: dict[str, Estimate]  # Spearman of the experts a token collects with M, per range of t
    foreground: dict[str, Estimate]  # the same with the foreground mask, over images that have one
    saliency_by_time: dict[float, Estimate]  # Spearman with M at each single time
    experts: dict[str, Estimate]  # mean experts per token, MoE layer and step: the compute spent
    experts_by_saliency: dict[str, tuple[Estimate, ...]]  # the same by quantile of M, least salient fifth first
    flow: dict[str, Estimate]  # flow loss
    constant: dict[str, int]  # images left out of `saliency`: all tokens alike in experts or in M
    per_image: dict[str, dict[str, tuple[float, ...]]]  # the values behind saliency, foreground, experts, flow
    images: int
    times: tuple[float, ...]


def measure(
    model: DiT, samples: Samples, *, images: int = 128, seed: int = 0, chunk: int = 16, share: Share = ALONE
) -> Allocation:
    """Roll the model out over held-out samples at ten fixed times from 0.999 to 0.05 and summarise its allocation.

    Eval mode, fixed noise, captions kept; communicates through `share.reduce` alone, the same result on every rank.
    """
    indices = spread(samples.num_samples, images)
    observed = observe(model, samples, indices, ALLOCATION_TIMES, seed=seed, chunk=chunk, share=share)
    return summarise(observed, ALLOCATION_TIMES, num_layers=len(model.moe_layers()))


def summarise(observed: Observed, times: Sequence[float], num_layers: int) -> Allocation:
    """Summarise observed rollouts (I, T, N) of a model with `num_layers` MoE layers."""
    collected = {name: observed.experts[:, _within(times, bounds)].sum(1) for name, bounds in RANGES.items()}
    steps = {name: int(_within(times, bounds).sum()) for name, bounds in RANGES.items()}
    per_layer = {name: total / max(steps[name] * num_layers, 1) for name, total in collected.items()}
    bins = {name: _by_quantile(mean, observed.saliency) for name, mean in per_layer.items()}
    values = {
        "saliency": {name: spearman(total, observed.saliency) for name, total in collected.items()},
        "foreground": {name: spearman(total, observed.foreground) for name, total in collected.items()},
        "experts": {name: mean.mean(1) for name, mean in per_layer.items()},
        "flow": {name: observed.flow[:, _within(times, bounds)].mean(1) for name, bounds in RANGES.items()},
    }
    return Allocation(
        **{what: {name: estimate(value) for name, value in ranges.items()} for what, ranges in values.items()},
        saliency_by_time={
            t: estimate(spearman(observed.experts[:, k], observed.saliency)) for k, t in enumerate(times)
        },
        experts_by_saliency={name: tuple(estimate(column) for column in rows.T) for name, rows in bins.items()},
        constant={name: int(value.isnan().sum()) for name, value in values["saliency"].items()},
        per_image={
            what: {name: tuple(value.tolist()) for name, value in ranges.items()} for what, ranges in values.items()
        },
        images=len(observed.experts),
        times=tuple(times),
    )


def change(before: Allocation, after: Allocation, what: str, name: str) -> Estimate:
    """Mean paired change of a figure (`what` in per_image) over the same images: sharper than two separate means."""
    pair = [torch.tensor(result.per_image[what][name], dtype=torch.float64) for result in (before, after)]
    return estimate(pair[1] - pair[0])


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..N of each row (I, N), equal values sharing the mean of their ranks; float64."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman rank correlation of each row of a and b (I, N): (I,) float64, NaN where a row is constant or has NaN."""
    ranks = [average_ranks(values) for values in (a, b)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    known = (norm > 0) & ~a.isnan().any(1) & ~b.isnan().any(1)
    return torch.where(known, (centred[0] * centred[1]).sum(1) / norm, torch.nan)


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of the values (I,) that are not NaN."""
    known = values.double()[~values.isnan()]
    if not len(known):
        return Estimate(math.nan, math.nan, 0)
    error = (known.std() / len(known) ** 0.5).item() if len(known) > 1 else math.nan
    return Estimate(known.mean().item(), error, len(known))


def _within(times: Sequence[float], bounds: tuple[float, float]) -> Tensor:
    lower, upper = bounds
    return torch.tensor([lower < t <= upper for t in times])


def _by_quantile(values: Tensor, saliency: Tensor) -> Tensor:
    """Mean of values (I, N) over each fifth of the tokens by saliency: (I, 5), NaN where ties leave a fifth empty."""
    num_tokens = saliency.shape[1]
    bins = ((average_ranks(saliency) - 0.5) / num_tokens * NUM_BINS).long()
    members = torch.nn.functional.one_hot(bins, NUM_BINS).double()  # (I, N, 5)
    return torch.einsum("in,inq->iq", values.double(), members) / members.sum(1)


def table(results: dict[str, Allocation]) -> str:
    """Lay results out side by side, one column each ({"before": ..., "after": ...}); two get their paired change."""
    columns = list(results.values())
    paired = len(columns) == 2 and columns[0].images == columns[1].images
    lines = [
        f"Allocation on {columns[0].images} held-out images, {len(columns[0].times)} times (mean ± standard error)",
        _line("", [*results, "change (paired)"] if paired else list(results)),
    ]
    for what, title in TITLES.items():
        rows = {name: [getattr(column, what)[name] for column in columns] for name in RANGES}
        if not any(e.images for row in rows.values() for e in row):
            continue
        lines.append(title)
        for name, row in rows.items():
            changes = [_cell(change(columns[0], columns[1], what, name), "+")] if paired else []
            lines.append(_line("  " + name, [*map(_cell, row), *changes]))
        lines += _fifths(columns) if what == "experts" else []
    if any(sum(column.constant.values()) for column in columns):
        lines.append("images left out of the correlation with M: every token alike")
        lines += [_line("  " + name, [str(column.constant[name]) for column in columns]) for name in RANGES]
    return "\n".join(lines)


def _fifths(columns: list[Allocation]) -> list[str]:
    rows = zip(FIFTHS, *(column.experts_by_saliency["all t"] for column in columns), strict=True)
    return [_line("  " + label, [_cell(e) for e in row]) for label, *row in rows]


def _line(label: str, cells: list[str]) -> str:
    return f"{label:<26}" + "".join(f"{cell:>20}" for cell in cells)


def _cell(value: Estimate, sign: str = "") -> str:
    return f"{value.mean:{sign}.4f} ± {value.error:.4f}" if value.images else "undefined"


def save(result: Allocation, path: Path | str) -> Path:
    """Write a result as JSON, making its folder; undefined figures become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load(path: Path | str) -> Allocation:
    """Read back what `save` wrote; DataError where the file is missing or was not written by it."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return Allocation(
            **{what: {name: _estimate_of(e) for name, e in fields[what].items()} for what in TITLES},
            saliency_by_time={float(t): _estimate_of(e) for t, e in fields["saliency_by_time"].items()},
            experts_by_saliency={
                name: tuple(_estimate_of(e) for e in row) for name, row in fields["experts_by_saliency"].items()
            },
            constant=fields["constant"],
            per_image={
                what: {name: tuple(_known(v) for v in row) for name, row in ranges.items()}
                for what, ranges in fields["per_image"].items()
            },
            images=fields["images"],
            times=tuple(fields["times"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an allocation result ({error}); run launcher/evaluate.py again") from None


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _estimate_of(fields: dict[str, float | None]) -> Estimate:
    return Estimate(_known(fields["mean"]), _known(fields["error"]), int(fields["images"] or 0))


def scalars(result: Allocation) -> dict[str, float]:
    """Name the main figures for the log: allocation/<what>/<range>; undefined ones are left out."""
    named = {f"allocation_{what}/{name}": e.mean for what in TITLES for name, e in getattr(result, what).items()}
    return {name.replace(" ", ""): value for name, value in named.items() if not math.isnan(value)}


def _plain(value: object) -> object:
    """Turn NamedTuples into dicts and NaN into None, all the way down."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
