import pytest
import torch

from data_pipeline.encode.patch_pca import PatchPCA
from sharpmoe.errors import DataError


def smooth_images(count: int = 24, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


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


def test_identity_tells_fits_apart() -> None:
    first, second = PatchPCA.fit([smooth_images()], 4, 8), PatchPCA.fit([smooth_images(seed=1)], 4, 8)
    assert first.identity != second.identity
    assert first.identity == PatchPCA.fit([smooth_images()], 4, 8).identity
