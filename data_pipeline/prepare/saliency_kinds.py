"""Where the saliency map M of an image comes from: the table behind `--saliency`. A new kind is a row."""

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.saliency import (
    MISSING,
    EncodedImages,
    MapContext,
    Maps,
    SaliencyChoice,
    SaliencyKind,
    parse_saliency,
)
from data_pipeline.encode.saliency_models import MODEL
from sharpmoe.saliency import saliency_map, token_mask


def _laplacian(choice: SaliencyChoice, context: MapContext) -> Maps:
    return lambda batch: saliency_map(batch.images, batch.grid)


def _foreground(choice: SaliencyChoice, context: MapContext) -> Maps:
    return lambda batch: _pooled([picture.alpha for picture in batch.pictures], batch)


def _supplied(choice: SaliencyChoice, context: MapContext) -> Maps:
    return lambda batch: _pooled([picture.saliency for picture in batch.pictures], batch)


def _pooled(maps: list[np.ndarray | None], batch: EncodedImages) -> Tensor:
    """Average maps (1, H, W) over the tokens of their images."""
    return token_mask(torch.from_numpy(np.stack([one for one in maps if one is not None])), batch.grid)


_SUPPLIED = SaliencyKind(
    name="supplied",
    text="NAME.saliency.png beside the image (in a folder or a tar) or the column `saliency` of a table",
    create=_supplied,
    options=MISSING,
    takes_maps=True,
    has_map=lambda picture: picture.saliency is not None,
    lacking="no saliency map",
)
SALIENCIES: dict[str, SaliencyKind] = {
    "laplacian": SaliencyKind(name="laplacian", text="|Laplacian| of its pixels", create=_laplacian),
    "foreground": SaliencyKind(
        name="foreground",
        text="its alpha channel",
        create=_foreground,
        options=MISSING,
        has_map=lambda picture: picture.alpha is not None,
        lacking="no transparency, so no foreground map (--saliency foreground:missing=laplacian takes one of its "
        "pixels, missing=flat zeros)",
    ),
    "file": _SUPPLIED,
    "supplied": _SUPPLIED,  # the older word
    "model": MODEL,
}
LAPLACIAN = parse_saliency("laplacian", SALIENCIES)
