from pathlib import Path

import pytest
import torch

from data_pipeline.encode.autoencoders import KLAutoencoder
from data_pipeline.encode.build import CODEC_FILE, codec_bytes, load_codec
from data_pipeline.encode.codecs import Codec, Pixel
from data_pipeline.encode.patch_pca import PatchPCA
from sharpmoe.errors import DataError


def stored(codec: Codec, folder: Path) -> None:
    (folder / CODEC_FILE).write_bytes(codec_bytes(codec))


def smooth_images(count: int = 24, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def test_pixel_codec(tmp_path: Path) -> None:
    images = smooth_images(2)
    stored(Pixel(), tmp_path)
    codec = load_codec(tmp_path)
    assert codec.latent_shape(32) == (3, 32, 32)
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_latents_of_pictures_that_are_not_square(autoencoder: Path) -> None:
    images = torch.zeros(1, 3, 8, 24)
    codecs: list[Codec] = [KLAutoencoder(str(autoencoder)), Pixel(), PatchPCA.fit([smooth_images()], 4, 8)]
    for codec in codecs:
        assert tuple(codec.encode(images).shape[1:]) == codec.latent_shape((8, 24))
        assert codec.decode(codec.encode(images)).shape == images.shape
    with pytest.raises(DataError, match="image size 10x24: codec patch_pca needs a multiple of 4"):
        codecs[2].latent_shape((10, 24))
