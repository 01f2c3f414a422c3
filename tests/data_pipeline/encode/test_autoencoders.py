import builtins
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.encode import autoencoders
from data_pipeline.encode.autoencoders import KLAutoencoder, QwenAutoencoder
from data_pipeline.encode.build import CODEC_FILE, codec_bytes, codec_settings, load_codec
from data_pipeline.encode.codecs import Codec, Pixel
from sharpmoe.errors import DataError
from tests.fixtures_data import tiny_qwen_autoencoder


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


@pytest.fixture(scope="module")
def qwen_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder of Qwen-Image and Nucleus-Image in small, in the folder of a pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    return tiny_qwen_autoencoder(folder / "vae").parent


def test_the_autoencoder_of_qwen_normalises_each_channel(qwen_autoencoder: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    images = smooth_images(3)
    codec = QwenAutoencoder(str(qwen_autoencoder))
    model = diffusers.AutoencoderKLQwenImage.from_pretrained(qwen_autoencoder / "vae").eval()
    mean, std = (torch.tensor(model.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        raw = model.encode(images[:, :, None]).latent_dist
        expected = ((raw.mean - mean) / std)[:, :, 0]
        decoded = model.decode(expected[:, :, None] * std + mean).sample[:, :, 0].clamp(-1, 1)
    latents = codec.encode(images)
    assert codec.latent_shape((32, 32)) == tuple(latents.shape[1:]) == (3, 8, 8)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.posterior(images).std, (raw.std / std)[:, :, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=1e-4, atol=1e-4)
    stored(codec, tmp_path)
    assert torch.equal(load_codec(tmp_path).encode(images), latents)
    with pytest.raises(DataError, match="codec autoencoder_qwen needs a multiple of 4"):
        codec.latent_shape(34)


def test_no_images_have_no_latents(qwen_autoencoder: Path) -> None:
    codec, images = QwenAutoencoder(str(qwen_autoencoder)), smooth_images(1)
    for found in codec.posterior(images[:0]):
        assert found is not None
        assert found.shape == (0, *codec.encode(images).shape[1:])
    assert codec.decode(codec.encode(images[:0])).shape == (0, *images.shape[1:])


def test_large_images_are_encoded_a_few_at_a_time(qwen_autoencoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, images = QwenAutoencoder(str(qwen_autoencoder)), smooth_images(5)
    whole = codec.posterior(images)
    drawn = codec.decode(whole.mean)
    counts: list[int] = []
    encode = codec._model.encode
    monkeypatch.setattr(codec._model, "encode", lambda x: counts.append(len(x)) or encode(x))
    monkeypatch.setattr(autoencoders, "_PIXELS", 2 * 32 * 32)
    split = codec.posterior(images)
    assert counts == [2, 2, 1]
    torch.testing.assert_close(split.mean, whole.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.std, whole.std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(whole.mean), drawn, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_of_another_kind_is_not_filled_with_random_numbers(
    autoencoder: Path, qwen_autoencoder: Path
) -> None:
    with pytest.raises(DataError, match=r"codec autoencoder_qwen: .* cannot be loaded"):
        QwenAutoencoder(str(autoencoder))
    with pytest.raises(DataError, match=r"codec autoencoder_kl: .* cannot be loaded"):
        KLAutoencoder(str(qwen_autoencoder))
    with pytest.raises(DataError, match="give its folder with --codec-name"):
        codec_settings({"codec": "autoencoder_qwen", "codec_name": None, "moments": None})


def test_weights_of_an_old_diffusers_are_whole(autoencoder: Path, tmp_path: Path) -> None:
    """Published autoencoders of Stable Diffusion name their attention as before: nothing of it is missing."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(autoencoder / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((autoencoder / "config.json").read_bytes())
    images = smooth_images(2)
    assert torch.equal(KLAutoencoder(str(tmp_path)).encode(images), KLAutoencoder(str(autoencoder)).encode(images))


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
