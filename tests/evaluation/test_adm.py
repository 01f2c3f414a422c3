"""The batch that the ADM evaluator takes, and the protocol beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.adm import AdmBatch, _balanced_labels, _figure_name, _to_bytes, _write_images, draw_adm_batch
from tests.toys import toy_model


def toy_batch(path: Path, num_images: int, batch_size: int) -> AdmBatch:
    return AdmBatch(path=path, num_images=num_images, image_size=8, batch_size=batch_size, weights="toy")


def test_labels_are_balanced() -> None:
    assert np.bincount(_balanced_labels(50_000, 1000)).tolist() == [50] * 1000
    counts = np.bincount(_balanced_labels(17, 5))
    assert counts.max() - counts.min() == 1


def test_only_fifty_thousand_images_are_fid_50k() -> None:
    assert _figure_name(50_000) == "FID-50K"
    assert "not FID-50K" in _figure_name(49_999)


def test_pixels_are_those_of_published_trainers() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert _to_bytes(images)[:, 0, 0, 0].tolist() == [0, 0, 128, 255]


def test_a_batch_is_the_same_whatever_its_chunks(tmp_path: Path) -> None:
    model = toy_model("ec", conditioning="class", num_classes=3)
    sample = SampleConfig(num_steps=2, cfg_scale=1.5)
    found = []
    for size in (2, 5):
        path = draw_adm_batch(
            model, sample, lambda z: z[:, :3].clamp(-1, 1), toy_batch(tmp_path / f"{size}.npz", 5, size)
        )
        with np.load(path) as arrays:
            assert arrays.files == ["arr_0"]
            found.append(arrays["arr_0"])
    assert found[0].shape == (5, 8, 8, 3)
    assert found[0].dtype == np.uint8
    assert np.abs(found[0].astype(int) - found[1].astype(int)).max() <= 1
    assert not (found[0][0] == found[0][3]).all()  # the same class, other noise
    shown = json.loads((tmp_path / "5.json").read_text())
    assert shown["figure"] == "FID of 5 images, not FID-50K"
    assert shown["grid"].startswith("linspace(1, 0, 2 + 1)")
    assert {"images", "steps", "cfg_scale", "weights", "seed", "labels", "extractor"} <= shown.keys()


def test_a_wrong_number_and_a_wrong_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 3"):
        _write_images(tmp_path / "a.npz", [np.zeros((2, 4, 4, 3), np.uint8)], 3, 4)
    assert list(tmp_path.iterdir()) == []  # no draft either
    with pytest.raises(ConfigError, match="class-conditional"):
        draw_adm_batch(toy_model("ec"), SampleConfig(), lambda z: z, toy_batch(tmp_path / "b.npz", 1, 1))
