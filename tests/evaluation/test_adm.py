"""The batch that the ADM evaluator takes, and the protocol beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.sample import main
from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.adm import AdmBatch, _balanced_labels, _figure_name, _to_bytes, _write_images, draw_adm_batch
from sharpmoe.model.weights import save_weights
from tests.fixtures_data import make_shards
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
    told = json.loads((tmp_path / "5.json").read_text())
    assert told["figure"] == "FID of 5 images, not FID-50K"
    assert told["grid"].startswith("linspace(1, 0, 2 + 1)")
    assert {"images", "steps", "cfg_scale", "weights", "seed", "labels", "extractor"} <= told.keys()


def test_a_wrong_number_and_a_wrong_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 3"):
        _write_images(tmp_path / "a.npz", [np.zeros((2, 4, 4, 3), np.uint8)], 3, 4)
    assert list(tmp_path.iterdir()) == []  # no draft either
    with pytest.raises(ConfigError, match="class-conditional"):
        draw_adm_batch(toy_model("ec"), SampleConfig(), lambda z: z, toy_batch(tmp_path / "b.npz", 1, 1))


def test_the_command_writes_batch_and_protocol(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(tmp_path / "toy.safetensors", model.state_dict(), model.config)
    words = ["--shards", str(shards), "--npz", str(tmp_path / "batch.npz"), "--num", "5", "--steps", "2"]
    assert main([str(tmp_path / "toy.safetensors"), *words, "--cfg-scale", "1.0", "--batch-size", "4"]) == 0
    with np.load(tmp_path / "batch.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 3)
    assert json.loads((tmp_path / "batch.json").read_text())["cfg_scale"] == 1.0


def test_parts_join_to_the_batch_of_one_process(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(tmp_path / "toy.safetensors", model.state_dict(), model.config)
    common = [str(tmp_path / "toy.safetensors"), "--shards", str(shards), "--num", "7", "--steps", "2"]
    words = [*common, "--batch-size", "2", "--npz"]
    parts = str(tmp_path / "parts.npz")
    assert main([*words, str(tmp_path / "whole.npz")]) == 0
    assert main([*words, parts, "--part", "1/3"]) == main([*words, parts, "--part", "2/3"]) == 0
    assert main([*words, parts, "--join", "3"]) == 2  # one is missing
    assert not (tmp_path / "parts.npz").exists()
    assert main([*words, parts, "--part", "3/3"]) == main([*words, parts, "--join", "3"]) == 0
    with np.load(tmp_path / "whole.npz") as whole, np.load(parts) as joined:
        assert (whole["arr_0"] == joined["arr_0"]).all()
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "parts.json").read_text()
