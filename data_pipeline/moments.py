"""Latents that another project has cached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sharpmoe.errors import DataError

SD_VAE_SCALE = 0.18215


class Autoencoder(Protocol):
    """What turns latents into pictures and back."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        ...


class CachedMoments:
    """Latents that ProMoE's preprocess_vae.py has cached: posterior mean * 0.18215 of a Stable Diffusion autoencoder.

    Its files hold `latent` and `latent_flip`, (8, h, w) means and log variances, or (4, h, w) latents. The autoencoder
    itself is needed for pictures only.
    """

    def __init__(self, name: str, autoencoder: Callable[[], Autoencoder]) -> None:
        """`name`: folder or hub id of the autoencoder that made the cache; `autoencoder` loads it."""
        self._name, self._autoencoder = name, autoencoder

    @property
    def identity(self) -> dict[str, Any]:
        """Name of the autoencoder and the latents' scale."""
        return {"kind": "cached_moments", "name": self._name, "scale": SD_VAE_SCALE}

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(4, image_size / 8, image_size / 8)."""
        if image_size % 8:
            raise DataError(f"image size {image_size}: codec cached_moments needs a multiple of 8")
        return 4, image_size // 8, image_size // 8

    def read(self, path: Path, flip: bool, image_size: int) -> Tensor:
        """Latent (4, h, w) float32 of a cached file. DataError where it is damaged or of another size."""
        key = "latent_flip" if flip else "latent"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                moments = torch.from_numpy(arrays[key]).float()
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{path}: not a cached latent with `{key}` ({error}); cache it again") from None
        _, height, width = self.latent_shape(image_size)
        moments = moments.squeeze(1) if moments.ndim == 4 else moments
        if moments.ndim != 3 or moments.shape[0] not in (4, 8) or moments.shape[1:] != (height, width):
            expected = f"(8, {height}, {width}) of {image_size} pixels"
            raise DataError(f"{path}: {key} has shape {tuple(moments.shape)}, expected {expected}; set --size")
        return moments[:4] * SD_VAE_SCALE

    def encode(self, images: Tensor) -> Tensor:
        """Encode as the autoencoder does."""
        return self._autoencoder().encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode with the autoencoder."""
        return self._autoencoder().decode(latents)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the latents are cached, and the autoencoder stays where it is."""
        return {}
