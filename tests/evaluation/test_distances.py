"""Distances against closed forms, against torch-fidelity 0.4.0 (recorded values), and against what spoils a set."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sharpmoe.evaluation.distances import (
    Gaussian,
    frechet_distance,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width))).float()


X = normal(1500, 48, 0)
Y = normal(1200, 48, 1) * 1.2 + 0.3

# torch-fidelity 0.4.0 on these features: fid, kid (defaults), prc of Y against X, isc of 3 X[:, :10] in three splits
FIDELITY = {
    "fid": 7.095965552,
    "kid": 0.3002159286,
    "kid_std": 0.006964483084,
    "precision": 0.1199999973,
    "recall": 0.9306666851,
    "isc": 3.842799122,
    "isc_std": 0.0145781678,
}


def test_the_frechet_distance_of_two_gaussians_is_its_closed_form() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((6, 6)) for _ in range(2))
    first = Gaussian(generator.standard_normal(6), a @ a.T)
    scaled = Gaussian(first.mean + 2.0, 4 * first.covariance)  # commuting covariances: roots differ by a factor of two
    assert math.isclose(frechet_distance(first, scaled), 6 * 4.0 + np.trace(first.covariance), rel_tol=1e-9)
    other = Gaussian(first.mean, b @ b.T)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, other) == pytest.approx(frechet_distance(other, first), rel=1e-9)


def test_singular_covariances_have_a_distance() -> None:
    """Fewer images than features: the covariances have no full rank."""
    few, others = Gaussian.of(normal(5, 20, 0)), Gaussian.of(normal(7, 20, 1))
    assert math.isfinite(frechet_distance(few, others))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


def test_equal_sets_are_at_no_distance_and_different_ones_are() -> None:
    halves = kernel_distance(X[:700], X[700:1400], subset_size=300, subsets=20)
    assert abs(halves.mean) < 0.02
    assert kernel_distance(X, Y, subset_size=300, subsets=20).mean > 10 * abs(halves.mean)
    assert gaussian_mmd(X, X) == pytest.approx(0, abs=1e-9)
    assert gaussian_mmd(X[:700], X[700:1400]) < gaussian_mmd(X, Y) / 5


def test_the_unbiased_estimate_is_the_double_sum_without_the_diagonal() -> None:
    x, y = X[:9, :5].double(), Y[:9, :5].double()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(kernel(p[i], p[j]) for p in (x, y) for i, j in pairs if i != j) / 72
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 81
    found = kernel_distance(x, y, subsets=3)
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert found.deviation == pytest.approx(0, abs=1e-9)


def test_a_tight_cluster_is_precise_and_recalls_little() -> None:
    """Mode collapse; a tool of the field had the two figures swapped for years."""
    collapsed = X[:1] + 0.05 * normal(800, 48, 2)
    found = precision_recall(X, collapsed)
    assert found.precision > 0.8
    assert found.recall < 0.3
    swapped = precision_recall(collapsed, X)
    assert swapped == (found.recall, found.precision)


def test_precision_and_recall_equal_the_definition() -> None:
    real, fake = X[:40, :3].double(), Y[:30, :3].double()
    distances = [[float((a - b).square().sum()) for b in real] for a in real]
    radii = [sorted(row)[3] for row in distances]  # its own distance 0 comes first
    within = [any(float((f - r).square().sum()) <= radius for r, radius in zip(real, radii, strict=True)) for f in fake]
    assert precision_recall(real, fake).precision == pytest.approx(sum(within) / 30)
    with pytest.raises(ValueError, match="need more than 3"):
        precision_recall(real, fake[:3])


def test_the_inception_score_of_certain_and_of_constant_classes() -> None:
    certain = 50.0 * torch.eye(10).repeat(10, 1)
    assert inception_score(certain).mean == pytest.approx(10, rel=1e-6)
    assert inception_score(torch.ones(100, 10)).mean == pytest.approx(1, rel=1e-9)
    two = inception_score(torch.cat([certain, torch.ones(100, 10)]), split_size=100)
    assert (two.mean, two.deviation) == pytest.approx((5.5, 4.5), rel=1e-6)


def test_figures_are_those_of_torch_fidelity() -> None:
    """Recorded with torch-fidelity 0.4.0 on these features (fid, kid with its defaults, prc of Y against X, isc)."""
    assert frechet_distance(Gaussian.of(X), Gaussian.of(Y)) == pytest.approx(FIDELITY["fid"], rel=1e-5)
    assert kernel_distance(X, Y) == pytest.approx((FIDELITY["kid"], FIDELITY["kid_std"]), rel=1e-4)
    assert precision_recall(X, Y) == pytest.approx((FIDELITY["precision"], FIDELITY["recall"]), abs=1e-3)
    assert inception_score(3 * X[:, :10], split_size=500) == pytest.approx(
        (FIDELITY["isc"], FIDELITY["isc_std"]), rel=1e-5
    )
