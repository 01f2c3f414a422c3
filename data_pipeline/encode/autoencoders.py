"""Latents of pretrained autoencoders: encoded here, or cached by another project."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.encode.codecs import CachedLatent, ImageSize, Posterior, divided
from data_pipeline.encode.hub import check_model_is_had
from data_pipeline.identity import Identity, hash_state
from data_pipeline.members import decode_npz
from sharpmoe.errors import DamageError, DataError, first_line

_SD_VAE_SCALE = 0.18215
_PIXELS = 1 << 22  # of the images of one call: 96 channels of them are 1.6 GB in float32


class KLAutoencoder:
    """A pretrained `AutoencoderKL` of diffusers, from a local folder or a hub id; latents are posterior means."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        """Raises DataError where diffusers or the weights are missing."""
        self._name, self._device = name, device
        self._model = _load("autoencoder_kl", "AutoencoderKL", name, device)
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


class QwenAutoencoder:
    """The pretrained `AutoencoderKLQwenImage` of Qwen-Image and Nucleus-Image; latents are posterior means.

    It encodes videos: an image is one of a single frame. Each channel has a mean and a standard deviation of its own,
    which its configuration names.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        """`name`: local folder of the autoencoder or of a whole pipeline, or a hub id. Raises DataError."""
        self._name, self._device = name, device
        self._model = _load("autoencoder_qwen", "AutoencoderKLQwenImage", name, device)
        config = self._model.config
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        if not len(self._mean) == len(self._std) == config.z_dim:
            raise DataError(
                f"codec autoencoder_qwen: {name} has {len(self._mean)} means and {len(self._std)} standard deviations "
                f"for {config.z_dim} channels; correct latents_mean and latents_std in its config.json"
            )

    @cached_property
    def identity(self) -> Identity:
        """Name, mean and standard deviation of the channels, and a hash of the weights."""
        return {
            "kind": "autoencoder_qwen",
            "name": self._name,
            "mean": self._mean.flatten().tolist(),
            "std": self._std.flatten().tolist(),
            "sha256": hash_state(self._model.state_dict()),
        }

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """Return (latent channels, H / f, W / f) with f = 2 ** (levels - 1)."""
        config = self._model.config
        return config.z_dim, *divided(image_size, 2 ** len(config.temperal_downsample), "autoencoder_qwen")

    def encode(self, images: Tensor) -> Tensor:
        """Return (mean - mean of the channel) / standard deviation of the channel."""
        return self.posterior(images).mean

    @torch.no_grad()
    def posterior(self, images: Tensor, cached: Sequence[CachedLatent] = ()) -> Posterior:
        """Return the normalised mean and standard deviation, a few images at a time."""
        if not len(images):  # of which the network makes nothing
            none = images.new_zeros(0, *self.latent_shape((images.shape[-2], images.shape[-1])))
            return Posterior(none, none)
        parts = []
        for some in images.split(_images_at_a_time(images)):
            found = self._model.encode(some[:, :, None].to(self._device)).latent_dist
            mean, std = (found.mean[:, :, 0] - self._mean) / self._std, found.std[:, :, 0] / self._std
            parts.append((mean.to(images.device), std.to(images.device)))
        return Posterior(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Undo the normalisation, then decode, a few images at a time."""
        factor = 2 ** len(self._model.config.temperal_downsample)
        if not len(latents):
            return latents.new_zeros(0, 3, *(side * factor for side in latents.shape[-2:]))
        parts = []
        for some in latents.split(_images_at_a_time(latents, factor**2)):
            frames = (some.float().to(self._device) * self._std + self._mean)[:, :, None]
            parts.append(self._model.decode(frames).sample[:, :, 0].clamp(-1, 1).to(latents.device))
        return torch.cat(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the weights are not copied into the shards, and the identity holds their hash."""
        return {}


def _images_at_a_time(images: Tensor, pixels: int = 1) -> int:
    """Return how many images (B, C, H, W), of so many pixels per element, an autoencoder takes in one call."""
    return max(1, _PIXELS // (images.shape[-2] * images.shape[-1] * pixels))


def _load(kind: str, class_name: str, name: str, device: str) -> Any:
    """Load an autoencoder of diffusers: a hub id, its folder, or the folder of a pipeline that has it as vae/.

    Raises DataError, which names the codec `kind`, where diffusers or the weights are missing.
    """
    try:
        import diffusers  # noqa: PLC0415  (optional)
    except ImportError:
        raise DataError(f"codec {kind} needs diffusers; pip install diffusers, or use --codec patch_pca") from None
    inside = Path(name) / "vae"
    try:
        check_model_is_had(name)
        model, found = getattr(diffusers, class_name).from_pretrained(
            str(inside if inside.is_dir() else name),
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        lacking = sorted(found.get("missing_keys", ()))
        if lacking:  # they would be random numbers, and nobody would notice
            raise ValueError(f"{len(lacking)} weights are missing, {lacking[0]} among them")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise DataError(
            f"codec {kind}: {name} cannot be loaded ({first_line(error)}); expected a diffusers folder or hub id with "
            f"an {class_name}"
        ) from None
    return model.to(device).eval().requires_grad_(False)


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
