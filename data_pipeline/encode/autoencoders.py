"""Latents of pretrained autoencoders: encoded here, or cached by another project."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.encode.codecs import CachedLatent, ImageSize, Posterior, divided
from data_pipeline.identity import Identity, hash_state
from data_pipeline.members import decode_npz
from sharpmoe.errors import DamageError, DataError, first_line

_SD_VAE_SCALE = 0.18215


class KLAutoencoder:
    """A pretrained `AutoencoderKL` of diffusers, from a local folder or a hub id; latents are posterior means."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Raises DataError where diffusers or the weights are missing."""
        try:
            from diffusers import AutoencoderKL  # noqa: PLC0415  (optional)
        except ImportError:
            raise DataError(
                "codec autoencoder_kl needs diffusers; pip install diffusers, or use --codec patch_pca"
            ) from None
        self._name, self._device = name, device
        try:
            self._model = (
                AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
                .to(device)
                .eval()
                .requires_grad_(False)
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"codec autoencoder_kl: {name} cannot be loaded ({first_line(error)}); expected a "
                "diffusers folder or hub id with an AutoencoderKL"
            ) from None
        self._scale = float(self._model.config.scaling_factor)
        self._shift = float(self._model.config.get("shift_factor") or 0.0)

    @property
    def identity(self) -> Identity:
        """Name, latent scaling, and a hash of the weights."""
        return {
            "kind": "autoencoder_kl",
            "name": self._name,
            "scale": self._scale,
            "shift": self._shift,
            "sha256": hash_state(self._model.state_dict()),
        }

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (latent channels, H / f, W / f) with f = 2 ** (levels - 1)."""
        config = self._model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, *divided(image_size, factor, "autoencoder_kl")

    def encode(self, images: Tensor) -> Tensor:
        """Return (mean - shift) * scale."""
        return self.posterior(images).mean

    @torch.no_grad()
    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        """Return (mean - shift) * scale and std * scale: a sample of the latent is mean + std * standard normal."""
        found = self._model.encode(images.to(self._device)).latent_dist
        mean, std = (found.mean - self._shift) * self._scale, found.std * self._scale
        return Posterior(mean.to(images.device), std.to(images.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo the scaling, then decode."""
        images = self._model.decode(latents.float().to(self._device) / self._scale + self._shift).sample
        return images.clamp(-1, 1).to(latents.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the weights are not copied into the shards, and the identity holds their hash."""
        return {}


class CachedMoments:
    """Latents that ProMoE's preprocess_vae.py has cached: posterior mean * 0.18215 of a Stable Diffusion autoencoder.

    Its files hold `latent` and `latent_flip`, (8, h, w) means and log variances, or (4, h, w) latents. The autoencoder
    itself is loaded only to encode or decode images.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        """`name`: folder or hub id of the autoencoder that made the cache."""
        self._name, self._device = name, device

    @property
    def identity(self) -> Identity:
        """Name of the autoencoder and the scale of the latents."""
        return {"kind": "cached_moments", "name": self._name, "scale": _SD_VAE_SCALE}

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (4, H / 8, W / 8)."""
        return 4, *divided(image_size, 8, "cached_moments")

    def encode(self, images: Tensor) -> Tensor:
        """Encode with the autoencoder."""
        return self._autoencoder().encode(images)

    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        """Read the cached latents of the images; `std` is None where a file holds latents only.

        Raises DataError where an image has no cached latent, or a file is damaged or of another size.
        """
        size = (images.shape[-2], images.shape[-1])
        found = [self._read(entry, size) for entry in cached]
        stds = [std for _, std in found if std is not None]
        mean = torch.stack([mean for mean, _ in found])
        return Posterior(mean, torch.stack(stds) if len(stds) == len(found) else None)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode with the autoencoder."""
        return self._autoencoder().decode(latents)

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: neither the cached latents nor the autoencoder are copied into the codec file."""
        return {}

    def _autoencoder(self) -> KLAutoencoder:
        return KLAutoencoder(self._name, self._device)

    def _read(self, entry: CachedLatent, image_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Read a latent (4, h, w) float32 and its std, which is None where only latents are cached."""
        if not entry.file:
            raise DataError(f"{entry.image}: codec cached_moments needs cached latents; pass --moments FOLDER")
        key = "latent_flip" if entry.mirrored else "latent"
        try:
            arrays = decode_npz(Path(entry.file).read_bytes(), compressed=True)
            moments = torch.from_numpy(arrays[key].copy()).float()
        except (OSError, KeyError, DamageError) as error:
            raise DataError(f"{entry.file}: not a cached latent with `{key}` ({error}); cache it again") from None
        _, height, width = self.latent_shape(image_size)
        moments = moments.squeeze(1) if moments.ndim == 4 else moments
        if moments.ndim != 3 or moments.shape[0] not in (4, 8) or moments.shape[1:] != (height, width):
            expected = f"(8, {height}, {width}) of {image_size[0]}x{image_size[1]} pixels"
            raise DataError(f"{entry.file}: {key} has shape {tuple(moments.shape)}, expected {expected}; set --size")
        std = (0.5 * moments[4:].clamp(-30, 20)).exp() * _SD_VAE_SCALE if len(moments) == 8 else None
        return moments[:4] * _SD_VAE_SCALE, std
