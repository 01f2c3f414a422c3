"""Pictures to latents and back. A codec has an identity that travels with the shards."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipeline.encode.moments import CachedMoments
from data_pipeline.encode.patch_pca import PatchPCA
from data_pipeline.identity import Identity, check_identity, first_line, hash_state
from data_pipeline.sizes import ImageSize, divided, sides
from sharpmoe.errors import DataError

CODEC_FILE = "codec.safetensors"


class Posterior(NamedTuple):
    """Latents of a batch of images."""

    mean: Tensor  # (B, C, h, w) float32, scaled as the model sees it
    std: Tensor | None  # the same, scaled too; None where the codec knows one latent per image


class Codec(Protocol):
    """Images to latents of about unit variance, and back."""

    @property
    def identity(self) -> Identity:
        """Equal for two codecs if and only if they give the same latents."""
        ...

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """(C, h, w) of images of that size; DataError where it does not divide."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] -> (B, C, h, w) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) float32 -> (B, 3, H, W) float32, clamped to [-1, 1]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored with the shards to build the codec again."""
        ...


class Pixel:
    """No codec: the latent is the image itself, in [-1, 1]."""

    identity: Identity = {"kind": "pixel"}  # noqa: RUF012  (never written)

    def latent_shape(self, image_size: ImageSize) -> tuple[int, int, int]:
        """(3, H, W)."""
        return 3, *sides(image_size)

    def encode(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, clamped."""
        return latents.float().clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


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
        """(latent channels, H / f, W / f) with f = 2 ** (levels - 1)."""
        config = self._model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, *divided(image_size, factor, "autoencoder_kl")

    def encode(self, images: Tensor) -> Tensor:
        """(mean - shift) * scale."""
        return self.posterior(images).mean

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Posterior:
        """(mean - shift) * scale and std * scale: a sample of the latent is mean + std * standard normal noise."""
        found = self._model.encode(images.to(self._device)).latent_dist
        mean, std = (found.mean - self._shift) * self._scale, found.std * self._scale
        return Posterior(mean.to(images.device), std.to(images.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Inverse scaling, then the decoder."""
        images = self._model.decode(latents.float().to(self._device) / self._scale + self._shift).sample
        return images.clamp(-1, 1).to(latents.device)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the weights stay where they are, and the identity holds their hash."""
        return {}


def posterior(codec: Codec, images: Tensor) -> Posterior:
    """Mean and std of a codec that has both, else its one latent."""
    return codec.posterior(images) if isinstance(codec, KLAutoencoder) else Posterior(codec.encode(images), None)


def build_codec(spec: Identity, training_images: Iterable[Tensor], device: str = "cpu") -> Codec:
    """A codec from what the user asked for; only patch_pca looks at the training images ((B, 3, H, W) batches)."""
    if spec["kind"] == "patch_pca":
        return PatchPCA.fit(training_images, spec["patch"], spec["channels"], spec["whiten"])
    if spec["kind"] == "autoencoder_kl":
        return KLAutoencoder(spec["name"], device)
    if spec["kind"] == "cached_moments":
        return CachedMoments(spec["name"], lambda: KLAutoencoder(spec["name"], device))
    if spec["kind"] == "pixel":
        return Pixel()
    raise DataError(f"codec {spec['kind']!r}: expected patch_pca, autoencoder_kl, cached_moments or pixel")


def codec_bytes(codec: Codec) -> bytes:
    """The codec's tensors and identity as a safetensors file."""
    return save(codec.tensors(), metadata={"identity": json.dumps(codec.identity, sort_keys=True)})


def load_codec(folder: str | Path, device: str = "cpu") -> Codec:
    """The codec stored with a folder of shards.

    Raises DataError where the file is missing or damaged, or where an autoencoder's weights are no longer those that
    made the shards.
    """
    path = Path(folder) / CODEC_FILE
    try:
        with safe_open(path, framework="pt") as file:
            identity = json.loads((file.metadata() or {})["identity"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path}: not a codec file ({first_line(error)}); delete it and run launcher/prepare.py again as before"
        ) from None
    codec: Codec
    if identity["kind"] == "patch_pca":
        codec = PatchPCA(identity["patch"], identity["whiten"], tensors["mean"], tensors["basis"], tensors["scale"])
    else:
        codec = build_codec(identity, (), device)
    check_identity("codec", str(path), found=codec.identity, expected=identity)
    return codec
