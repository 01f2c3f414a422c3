import builtins
from pathlib import Path

import pytest
import torch

from data_pipeline.encode.autoencoders import KLAutoencoder
from data_pipeline.encode.build import CODEC_FILE, build_codec, codec_bytes, load_codec
from data_pipeline.encode.codecs import Codec, Pixel
from data_pipeline.encode.patch_pca import PatchPCA
from sharpmoe.errors import DataError


def stored(codec: Codec, folder: Path) -> None:
    (folder / CODEC_FILE).write_bytes(codec_bytes(codec))


def smooth_images(count: int = 24, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


# --- patch PCA --------------------------------------------------------------------------------------------------------


def test_all_components_give_the_image_back() -> None:
    images = smooth_images()
    codec = PatchPCA.fit([images], 4, 48, 0.5)
    assert torch.allclose(codec.decode(codec.encode(images)), images, atol=1e-4)
    assert codec.latent_shape(32) == tuple(codec.encode(images).shape[1:]) == (48, 8, 8)


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_latents_are_centred_have_unit_variance_and_the_asked_spread(whiten: float) -> None:
    images = smooth_images()
    flat = PatchPCA.fit([images], 4, 8, 0.0).encode(images).transpose(0, 1).flatten(1)
    latents = PatchPCA.fit([images], 4, 8, whiten).encode(images).transpose(0, 1).flatten(1)
    assert latents.pow(2).mean().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean(1).abs().max() < 1e-3
    ratio = (flat.std(1) ** (1 - whiten)) / latents.std(1)
    assert torch.allclose(ratio, ratio[0].expand(8), rtol=1e-3)


def test_more_components_never_hurt_held_out_images() -> None:
    held_out = smooth_images(seed=1)
    errors = []
    for channels in (2, 4, 8, 16):
        codec = PatchPCA.fit([smooth_images()], 4, channels, 0.5)
        errors.append((codec.decode(codec.encode(held_out)) - held_out).pow(2).mean().item())
    assert errors == sorted(errors, reverse=True)


def test_half_whitening_loses_least_per_latent_error() -> None:
    images = smooth_images()
    noise = torch.randn(len(images), 16, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.1

    def damage(whiten: float) -> float:
        codec = PatchPCA.fit([images], 4, 16, whiten)
        latents = codec.encode(images)
        return (codec.decode(latents + noise) - codec.decode(latents)).pow(2).mean().item()

    assert damage(0.5) < min(damage(0.0), damage(0.25), damage(0.75), damage(1.0))


def test_the_fit_does_not_depend_on_the_batches() -> None:
    images = smooth_images()
    whole, parts = PatchPCA.fit([images], 4, 8), PatchPCA.fit(images.split(5), 4, 8)
    assert torch.allclose(whole.encode(images), parts.encode(images), atol=1e-4)


def test_flat_images_do_not_divide_by_zero() -> None:
    codec = PatchPCA.fit([torch.zeros(2, 3, 8, 8)], 4, 8, 1.0)
    assert codec.encode(torch.zeros(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("patch", "channels", "whiten", "message"),
    [(4, 49, 0.5, "1 to 48"), (4, 0, 0.5, "1 to 48"), (5, 8, 0.5, "multiple of 5"), (4, 8, 1.5, "expected 0")],
)
def test_settings_that_cannot_be(patch: int, channels: int, whiten: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PatchPCA.fit([smooth_images()], patch, channels, whiten)


def test_nothing_to_fit_on() -> None:
    with pytest.raises(DataError, match="no readable image"):
        PatchPCA.fit([])


# --- stored codecs ----------------------------------------------------------------------------------------------------


def test_a_codec_comes_back_from_its_file(tmp_path: Path) -> None:
    images = smooth_images()
    codec = PatchPCA.fit([images], 4, 8, 0.5)
    stored(codec, tmp_path)
    loaded = load_codec(tmp_path)
    assert loaded.identity == codec.identity
    assert torch.equal(loaded.encode(images), codec.encode(images))


def test_identity_tells_fits_apart() -> None:
    first, second = PatchPCA.fit([smooth_images()], 4, 8), PatchPCA.fit([smooth_images(seed=1)], 4, 8)
    assert first.identity != second.identity
    assert first.identity == PatchPCA.fit([smooth_images()], 4, 8).identity


def test_pixel_codec(tmp_path: Path) -> None:
    images = smooth_images(2)
    stored(Pixel(), tmp_path)
    codec = load_codec(tmp_path)
    assert codec.latent_shape(32) == (3, 32, 32)
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_missing_and_damaged_codec_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a codec file"):
        load_codec(tmp_path)
    stored(PatchPCA.fit([smooth_images()], 4, 8), tmp_path)
    content = bytearray((tmp_path / CODEC_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / CODEC_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"wrong codec in .*sha256"):
        load_codec(tmp_path)
    (tmp_path / CODEC_FILE).write_bytes(content[:50])
    with pytest.raises(DataError, match="not a codec file"):
        load_codec(tmp_path)


def test_unknown_kinds() -> None:
    with pytest.raises(DataError, match="expected one of patch_pca"):
        build_codec({"kind": "vq"}, ())


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


def test_latents_of_pictures_that_are_not_square(autoencoder: Path) -> None:
    images = torch.zeros(1, 3, 8, 24)
    codecs: list[Codec] = [KLAutoencoder(str(autoencoder)), Pixel(), PatchPCA.fit([smooth_images()], 4, 8)]
    for codec in codecs:
        assert tuple(codec.encode(images).shape[1:]) == codec.latent_shape((8, 24))
        assert codec.decode(codec.encode(images)).shape == images.shape
    with pytest.raises(DataError, match="image size 10x24: codec patch_pca needs a multiple of 4"):
        codecs[2].latent_shape((10, 24))


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
