from pathlib import Path

import pytest
import torch

from data_pipeline.encode.build import CODEC_FILE, build_codec, codec_bytes, load_codec
from data_pipeline.encode.codecs import Codec
from data_pipeline.encode.patch_pca import PatchPCA
from sharpmoe.errors import DataError


def stored(codec: Codec, folder: Path) -> None:
    (folder / CODEC_FILE).write_bytes(codec_bytes(codec))


def smooth_images(count: int = 24, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(-1, 1)


def test_a_codec_comes_back_from_its_file(tmp_path: Path) -> None:
    images = smooth_images()
    codec = PatchPCA.fit([images], 4, 8, 0.5)
    stored(codec, tmp_path)
    loaded = load_codec(tmp_path)
    assert loaded.identity == codec.identity
    assert torch.equal(loaded.encode(images), codec.encode(images))


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
