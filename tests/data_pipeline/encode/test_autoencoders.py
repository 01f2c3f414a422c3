import builtins
from pathlib import Path

import pytest
import torch

from data_pipeline.encode.autoencoders import KLAutoencoder
from data_pipeline.encode.build import CODEC_FILE, codec_bytes, load_codec
from data_pipeline.encode.codecs import Codec, Pixel
from sharpmoe.errors import DataError


def stored(codec: Codec, folder: Path) -> None:
    (folder / CODEC_FILE).write_bytes(codec_bytes(codec))


def smooth_images(count: int = 24, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def test_autoencoder_scales_and_comes_back(autoencoder: Path, tmp_path: Path) -> None:
    images = smooth_images(2)
    codec = KLAutoencoder(str(autoencoder))
    latents = codec.encode(images)
    assert codec.latent_shape(32) == tuple(latents.shape[1:]) == (4, 16, 16)
    raw = codec._model.encode(images).latent_dist.mean
    assert torch.allclose(latents, (raw - 0.25) * 0.5, atol=1e-6)
    assert torch.allclose(codec.decode(latents), codec._model.decode(raw).sample.clamp(-1, 1), atol=1e-4)
    stored(codec, tmp_path)
    assert torch.equal(load_codec(tmp_path).encode(images), latents)
    with pytest.raises(DataError, match="multiple of 2"):
        codec.latent_shape(33)


def test_the_posterior_is_scaled_like_its_mean(autoencoder: Path) -> None:
    images = smooth_images(2)
    codec = KLAutoencoder(str(autoencoder))
    mean, std = codec.posterior(images)
    raw = codec._model.encode(images).latent_dist
    assert torch.equal(mean, codec.encode(images))
    assert std is not None
    torch.testing.assert_close(std, raw.std * 0.5)
    noise = torch.randn(raw.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = ((raw.mean + raw.std * noise) - 0.25) * 0.5
    torch.testing.assert_close(mean + std * noise, drawn)
    assert Pixel().posterior(images).std is None


def test_weights_that_are_a_pickle_are_refused(autoencoder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((autoencoder / "config.json").read_bytes())
    torch.save(KLAutoencoder(str(autoencoder))._model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        KLAutoencoder(str(tmp_path))


def test_autoencoder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as error:
        KLAutoencoder(str(tmp_path))
    assert "\n" not in str(error.value)
    real = builtins.__import__

    def without_diffusers(name: str, *rest: object) -> object:
        if name == "diffusers":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(DataError, match="pip install diffusers"):
        KLAutoencoder(str(tmp_path))
