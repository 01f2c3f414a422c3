"""Extractors of transformers, on tiny random models: their features are those of the library on Pillow's pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
from transformers.utils import logging

from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.extractors import ExtractorOptions, open_extractor

pytestmark = pytest.mark.slow  # imports transformers

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40), dtype=np.uint8))
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7}


def pillow(images: torch.Tensor, side: int) -> torch.Tensor:
    resized = [
        np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def test_clip_features_are_normalised_embeddings(tmp_path: Path) -> None:
    config = CLIPVisionConfig(**SIZES, intermediate_size=32, image_size=28, projection_dim=8)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "tiny")
    extractor = open_extractor(ExtractorOptions("clip", tmp_path / "tiny"))
    found = extractor.compute(IMAGES).pool
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    pixels = (pillow(IMAGES, 28) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(pixel_values=pixels).image_embeds, dim=1)
    assert torch.allclose(found.norm(dim=1), torch.ones(2))
    assert torch.allclose(found, expected, atol=2e-2)  # Pillow rounds to whole levels
    assert extractor.name == "clip tiny"
    assert len(extractor.about["sha256"]) == 64


def test_dino_features_are_the_class_token(tmp_path: Path) -> None:
    model = Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, image_size=28)).eval()
    model.save_pretrained(tmp_path / "tiny")
    settings = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    found = open_extractor(ExtractorOptions("dinov2", tmp_path / "tiny")).compute(IMAGES).pool
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == settings  # of the whole process
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    pixels = (pillow(IMAGES, 224) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(found, expected, atol=5e-2 * float(expected.abs().max()))


def test_weights_that_are_missing_or_of_another_kind_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --extractor-weights: the folder of a DINOv2 model"):
        open_extractor(ExtractorOptions("dinov2"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no Dinov2Model in safetensors") as raised:
        open_extractor(ExtractorOptions("dinov2", tmp_path))
    assert "\n" not in str(raised.value)
