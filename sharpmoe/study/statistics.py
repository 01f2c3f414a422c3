"""Means and paired differences of arms over seeds and images, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

_LEVEL = 0.95


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
    half = float(student.ppf((1 + _LEVEL) / 2, freedom)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, seeds, counted)
