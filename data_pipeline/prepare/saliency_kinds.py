"""Where the saliency map M of an image comes from: the table behind `--saliency`. A new kind is a row."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.sources.images import Picture
from sharpmoe.saliency import saliency_map, token_mask

_Maps = Callable[[Tensor, Sequence[Picture], tuple[int, int]], Tensor]


class SaliencyKind(NamedTuple):
    """One origin of saliency maps."""

    maps: (
        _Maps  # images (B, 3, H, W) in [-1, 1], the same as pictures, token grid (h, w) -> (B, h * w) float32 in [0, 1]
    )
    is_supplied: bool = False  # every image needs a map of its own in the source


def _laplacian(images: Tensor, pictures: Sequence[Picture], grid: tuple[int, int]) -> Tensor:
    return saliency_map(images, grid)


def _supplied(images: Tensor, pictures: Sequence[Picture], grid: tuple[int, int]) -> Tensor:
    maps = [picture.saliency for picture in pictures if picture.saliency is not None]
    assert len(maps) == len(pictures)  # images without a map are left out when the source is listed
    return token_mask(torch.from_numpy(np.stack(maps)), grid)


SALIENCIES: dict[str, SaliencyKind] = {
    "laplacian": SaliencyKind(_laplacian),
    "supplied": SaliencyKind(_supplied, is_supplied=True),
}
