"""Intervals of crossed seeds and images."""

import math

import numpy as np
import pytest
from scipy import stats

from sharpmoe.study.statistics import interval_of


def test_one_value_per_seed_is_students_interval() -> None:
    values = [0.3, 0.5, 0.1]
    found = interval_of([[value] for value in values])
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found[:3] == pytest.approx((0.3, low, high))
    assert (found.seeds, found.images) == (3, 0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Seeds, images and both together vary; a bootstrap over images alone would cover far less."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        noise = random.normal(size=(3, 1)) * 0.5 + random.normal(size=(1, 20)) + random.normal(size=(3, 20)) * 0.5
        found = interval_of((1 + noise).tolist())
        hits += found.low <= 1 <= found.high
    assert 0.93 <= hits / 400 <= 1


def test_undefined_images_are_left_out_for_all_seeds() -> None:
    found = interval_of([[1.0, math.nan, 3.0], [2.0, 100.0, 4.0]])
    assert (found.mean, found.images, found.seeds) == (2.5, 2, 2)


def test_one_seed_has_no_interval_and_nothing_known_no_mean() -> None:
    assert math.isnan(interval_of([[1.0, 2.0]]).low)
    assert not interval_of([[1.0, 2.0]]).excludes_zero
    assert math.isnan(interval_of([[math.nan], [math.nan]]).mean)


def test_equal_values_have_no_width() -> None:
    assert interval_of([[1.0, 1.0], [1.0, 1.0]])[:3] == (1.0, 1.0, 1.0)
    assert interval_of([[1.0, 1.0], [1.0, 1.0]]).excludes_zero
