"""Intervals of crossed seeds and images."""

import math

import numpy as np
import pytest
from scipy import stats

from sharpmoe.evaluation.statistics import interval_of, interval_over_images, interval_over_steps, plain_interval


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


def test_an_interval_over_images_is_students_without_undefined_ones() -> None:
    values = [0.3, 0.5, 0.1, 0.4]
    found = interval_over_images([*values, math.nan])
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found[:3] == pytest.approx((np.mean(values), low, high))
    assert (found.seeds, found.images) == (1, 4)
    assert math.isnan(interval_over_images([1.0]).low)
    assert interval_over_images([]).images == 0


def test_steps_that_are_alike_do_not_narrow_an_interval() -> None:
    """A slow walk: Student's interval over its steps as if they were independent would be far too narrow."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=1000))
    found, naive = interval_over_steps(walk.tolist()), interval_over_images(walk.tolist())
    assert found.mean == pytest.approx(naive.mean)
    assert found.high - found.low > 5 * (naive.high - naive.low)


def test_a_few_steps_have_no_interval() -> None:
    few, more = interval_over_steps([0.4, 0.5, 0.4]), interval_over_steps([0.4, 0.5, 0.4, 0.5])
    assert few.mean == pytest.approx(1.3 / 3)
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert more.low < more.mean < more.high


def test_undefined_parts_are_null() -> None:
    assert plain_interval(interval_over_images([1.0])) == {
        "mean": 1.0,
        "low": None,
        "high": None,
        "seeds": 1,
        "images": 1,
    }
    assert plain_interval(None) is None
