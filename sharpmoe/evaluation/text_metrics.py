"""How well images show their captions: CLIPScore, retrieval of captions, and a linear map to captions without CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CLIP_SCORE_SCALE = 2.5  # of Hessel et al. (arXiv 2104.08718)
_RIDGE = 1e-2  # of the mean variance of a feature
_ROWS = 1024  # images whose similarities to all captions are in memory at a time


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return CLIPScore (N,) of pairs of embeddings (N, D): 2.5 x max(cosine, 0)."""
    return CLIP_SCORE_SCALE * functional.cosine_similarity(images.double(), texts.double(), dim=1).clamp(min=0)


def caption_ranks(images: Tensor, texts: Tensor, own: Sequence[int]) -> Tensor:
    """Return how many of M captions (M, D) are nearer to each image (N, D) than its own, by cosine: (N,) int64.

    own (N): which caption an image was drawn for. A caption at the same distance counts as nearer, so that images that
    fit all captions alike find none.
    """
    normed = functional.normalize(texts.double(), dim=1)
    mine, found = torch.as_tensor(own, dtype=torch.long), []
    for start in range(0, len(images), _ROWS):
        rows = mine[start : start + _ROWS]
        similar = functional.normalize(images[start : start + _ROWS].double(), dim=1) @ normed.T
        found.append((similar >= similar.gather(1, rows[:, None])).sum(1) - 1)
    return torch.cat(found)


class CaptionMap(NamedTuple):
    """A linear map from features of images to embeddings of captions, which a text encoder of words alone has."""

    weight: Tensor  # (D, E) float64
    feature_mean: Tensor  # (D,)
    text_mean: Tensor  # (E,)

    def images(self, features: Tensor) -> Tensor:
        """Return the captions' embeddings that features (N, D) suggest, without their mean: (N, E)."""
        return (features.double() - self.feature_mean) @ self.weight

    def texts(self, embeddings: Tensor) -> Tensor:
        """Return embeddings of captions (M, E) without their mean."""
        return embeddings.double() - self.text_mean


def fit_caption_map(features: Tensor, embeddings: Tensor) -> CaptionMap:
    """Fit features (N, D) of training images to the embeddings (N, E) of their captions by ridge regression."""
    x, y = features.double(), embeddings.double()
    feature_mean, text_mean = x.mean(0), y.mean(0)
    x, y = x - feature_mean, y - text_mean
    kernel = x @ x.T  # (N, N): fewer pairs than features is usual
    penalty = _RIDGE * kernel.diagonal().mean().clamp(min=1e-12)
    solved = torch.linalg.solve(kernel + penalty * torch.eye(len(x), dtype=torch.float64), y)
    return CaptionMap(x.T @ solved, feature_mean, text_mean)
