"""Means and paired differences over seeds, images and steps, with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

_LEVEL = 0.95
_BLOCKS = 10  # of a series of steps, at most
_FEWEST = 4  # steps: of two or three, Student's interval is so wide that it says nothing


class Interval(NamedTuple):
    """A mean with its 95 % interval; NaN bounds where one seed cannot tell."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int  # 0 for a figure that a whole set of images has

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


_UNKNOWN = Interval(math.nan, math.nan, math.nan, 0, 0)


def interval_of(rows: Sequence[Sequence[float]]) -> Interval:
    """Return the mean of figures (S seeds, I images) and its interval; differences of pairs, or figures of one arm.

    I = 1 is a figure of a whole set of images. Seeds and images are crossed random effects: the same images are seen by
    every seed. The variance of the mean is var(means of seeds) / S + var(means of images) / I, which counts the noise
    of single values twice and so is not too small; the interval is Student's with Welch and Satterthwaite's degrees of
    freedom, S - 1 where the seeds decide. Images where any value is NaN are left out. With one seed the first summand
    is unknown, and so are the bounds.
    """
    values = np.asarray(rows, dtype=np.float64)
    values = values[:, ~np.isnan(values).any(0)]
    seeds, images = values.shape
    if not values.size:
        return _UNKNOWN
    mean = float(values.mean())
    counted = images if images > 1 else 0
    if seeds < 2:
        return Interval(mean, math.nan, math.nan, seeds, counted)
    parts = [(float(values.mean(1).var(ddof=1)) / seeds, seeds - 1)]
    if images > 1:
        parts.append((float(values.mean(0).var(ddof=1)) / images, images - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(mean, mean, mean, seeds, counted)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = _half_width(variance, freedom)
    return Interval(mean, mean - half, mean + half, seeds, counted)


def interval_over_images(values: Sequence[float]) -> Interval:
    """Return the mean of values (I,), one per image of one model or pair of models, with Student's interval over them.

    It holds for the models that were measured: what another seed of their training would give is not in it. Values that
    are NaN are left out; one value has no interval.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        return _UNKNOWN
    mean, counted = float(known.mean()), len(known)
    if counted < 2:
        return Interval(mean, math.nan, math.nan, 1, counted)
    half = _half_width(float(known.var(ddof=1)) / counted, counted - 1)
    return Interval(mean, mean - half, mean + half, 1, counted)


def interval_over_steps(values: Sequence[float]) -> Interval:
    """Return the mean of a series (S,) with Student's interval over the means of at most ten consecutive blocks of it.

    Neighbouring steps are alike, and means of blocks much less so (batch means). Less than four steps have no interval.
    `images` of the result is 0.
    """
    series = np.asarray(values, dtype=np.float64)
    if not series.size:
        return _UNKNOWN
    if len(series) < _FEWEST:
        return Interval(float(series.mean()), math.nan, math.nan, 1, 0)
    blocks = [float(block.mean()) for block in np.array_split(series, min(_BLOCKS, len(series)))]
    return interval_over_images(blocks)._replace(mean=float(series.mean()), images=0)


def plain_interval(value: Interval | None) -> dict[str, float | int | None] | None:
    """Convert an interval to JSON values, what is undefined to null."""
    if value is None:
        return None
    return {key: None if part != part else part for key, part in value._asdict().items()}


def _half_width(variance: float, freedom: float) -> float:
    """Return half of the interval of a mean of this variance."""
    return float(student.ppf((1 + _LEVEL) / 2, freedom)) * math.sqrt(variance)
