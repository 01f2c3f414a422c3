"""Latents that another project has cached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.members import decode_npz
from data_pipeline.sizes import ImageSize, divided
from sharpmoe.errors import DamageError, DataError

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

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """(4, H / 8, W / 8)."""
        return 4, *divided(image_size, 8, "cached_moments")

    def read(self, path: str | Path, flip: bool, image_size: int) -> tuple[Tensor, Tensor | None]:
        """Latent (4, h, w) float32 of a cached file and its std, None where only latents are cached.

        Raises DataError where the file is damaged or of another size.
        """
        key = "latent_flip" if flip else "latent"
        try:
            moments = torch.from_numpy(decode_npz(Path(path).read_bytes(), compressed=True)[key].copy()).float()
        except (OSError, KeyError, DamageError) as error:
            raise DataError(f"{path}: not a cached latent with `{key}` ({error}); cache it again") from None
        _, height, width = self.latent_shape(image_size)
        moments = moments.squeeze(1) if moments.ndim == 4 else moments
        if moments.ndim != 3 or moments.shape[0] not in (4, 8) or moments.shape[1:] != (height, width):
            expected = f"(8, {height}, {width}) of {image_size} pixels"
            raise DataError(f"{path}: {key} has shape {tuple(moments.shape)}, expected {expected}; set --size")
        std = (0.5 * moments[4:].clamp(-30, 20)).exp() * SD_VAE_SCALE if len(moments) == 8 else None
        return moments[:4] * SD_VAE_SCALE, std

    def encode(self, images: Tensor) -> Tensor:
        """Encode as the autoencoder does."""
        return self._autoencoder().encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode with the autoencoder."""
        return self._autoencoder().decode(latents)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the latents are cached, and the autoencoder stays where it is."""
        return {}
