"""Distances between two sets of images in the features of a network: FID, KID, CMMD, precision and recall, IS.

Definitions follow the tools whose figures are published; a figure is comparable only with the same network, the same
preprocessing and the same numbers of images (docs/evaluation.md). All functions take features, never images, compute in
float64 unless stated, and do not communicate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_SINGULAR = 1e-6  # added to the diagonals where the product of the covariances has no finite root
_BLOCK = 4096  # rows of a block of pairwise distances


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64: all that a Frechet distance reads of a set."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fit features (N, D), N at least 2; the covariance is unbiased (ddof 1), as in the ADM evaluator."""
        values = features.detach().double().cpu().numpy()
        return cls(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)))


class Spread(NamedTuple):
    """A figure with its standard deviation over subsets."""

    mean: float
    deviation: float


class Coverage(NamedTuple):
    """Improved precision and recall (arXiv 1904.06991), both in [0, 1]."""

    precision: float  # share of the samples within the manifold of the reference
    recall: float  # share of the reference within the manifold of the samples


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (arXiv 1706.08500, eq. 6); FID with Inception features.

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2, which are real and not negative: equal to
    scipy's sqrtm to rounding, and defined where that is not, with singular covariances.
    """
    difference = first.mean - second.mean
    eigenvalues = np.linalg.eigvals(first.covariance @ second.covariance)
    if not np.isfinite(eigenvalues).all():
        offset = np.eye(len(first.mean)) * _SINGULAR
        eigenvalues = np.linalg.eigvals((first.covariance + offset) @ (second.covariance + offset))
    root = np.sqrt(eigenvalues.real.clip(min=0)).sum()
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * root)


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Spread:
    """Return KID (arXiv 1801.01401): the unbiased squared MMD under the kernel (x.y / D + 1)^3, over random subsets.

    features (N, D) and (M, D). Subsets are drawn as torch-fidelity draws them: without replacement inside a subset,
    from one numpy generator, first then second. `subset_size` is cut to the smaller set.
    """
    size = min(subset_size, len(first), len(second))
    random = np.random.RandomState(seed)
    x, y = first.double(), second.double()
    found = []
    for _ in range(subsets):
        rows, columns = (torch.from_numpy(random.choice(len(part), size, replace=False)) for part in (x, y))
        found.append(_polynomial_mmd(x[rows], y[columns]))
    return Spread(float(np.mean(found)), float(np.std(found)))


def _polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of equally many rows under (x.y / D + 1)^3."""
    count, width = x.shape
    within = [_cubed((part @ part.T) / width + 1) for part in (x, y)]
    across = _cubed((x @ y.T) / width + 1)
    same = sum((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1)) for kernel in within)
    return float(same - 2 * across.mean())


def _cubed(values: Tensor) -> Tensor:
    return values * values * values  # a power is several times slower in float64


def gaussian_mmd(first: Tensor, second: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return scale times the biased squared MMD under exp(-|x - y|^2 / (2 sigma^2)); features (N, D) and (M, D).

    CMMD (arXiv 2401.09603) where the features are normalised CLIP embeddings.
    """
    gamma = 1 / (2 * sigma**2)
    x, y = first.double(), second.double()
    means = [
        sum(torch.exp(-gamma * _squared_distances(block, b)).sum() for block in a.split(_BLOCK)) / (len(a) * len(b))
        for a, b in ((x, x), (y, y), (x, y))
    ]
    return float(scale * (means[0] + means[1] - 2 * means[2]))


def precision_recall(reference: Tensor, samples: Tensor, *, neighbours: int = 3) -> Coverage:
    """Return improved precision and recall: a point counts where it lies within the k-th neighbour's distance of any.

    features (N, D) of the reference and (M, D) of the samples, more than `neighbours` each. Distances are in float32,
    where the ADM evaluator has float16.
    """
    real, fake = reference.float(), samples.float()
    return Coverage(
        precision=_share_within(fake, real, _radii(real, neighbours)),
        recall=_share_within(real, fake, _radii(fake, neighbours)),
    )


def inception_score(logits: Tensor, *, split_size: int = 5000) -> Spread:
    """Return exp E KL(p(y | x) || p(y)) over splits of the images in their order (arXiv 1606.03498; ADM evaluator).

    logits (N, K), without the bias of the last layer. The deviation is over splits.
    """
    found = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        found.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return Spread(float(np.mean(found)), float(np.std(found)))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) of rows."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    return (squares - 2 * x @ y.T).clamp(min=0)


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Squared distance (N,) of every point to its k-th neighbour, itself not counted."""
    if len(points) <= neighbours:
        raise ValueError(f"{len(points)} images: precision and recall need more than {neighbours}")
    nearest = [
        _squared_distances(block, points).kthvalue(neighbours + 1, dim=1).values for block in points.split(_BLOCK)
    ]
    return torch.cat(nearest)


def _share_within(points: Tensor, others: Tensor, radii: Tensor) -> float:
    within = [(_squared_distances(block, others) <= radii).any(1) for block in points.split(_BLOCK)]
    return float(torch.cat(within).double().mean())
