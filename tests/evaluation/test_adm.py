"""The batch that the ADM evaluator takes, and the protocol beside it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpmoe.config import SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation import adm
from sharpmoe.evaluation.adm import (
    AdmBatch,
    _balanced_labels,
    _figure_name,
    _to_bytes,
    _write_images,
    classes_of_batch,
    draw_adm_batch,
    join_adm_batch,
)
from sharpmoe.sampling import ImagePart
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
        _write_images(tmp_path / "a.npz", [np.zeros((2, 4, 4, 3), np.uint8)], 3, (4, 4, 3))
    assert list(tmp_path.iterdir()) == []  # no draft either
    with pytest.raises(ConfigError, match="class-conditional"):
        draw_adm_batch(toy_model("ec"), SampleConfig(), lambda z: z, toy_batch(tmp_path / "b.npz", 1, 1))


def decoded(calls: list[int], fails_at: int = 99) -> Callable[[torch.Tensor], torch.Tensor]:
    """A decoder that counts its calls; one of them is cut off as by Ctrl-C."""

    def decode(latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return latents[:, :3].clamp(-1, 1)

    return decode


def test_a_killed_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    model, sample = toy_model("ec", conditioning="class", num_classes=3), SampleConfig(num_steps=2, cfg_scale=1.5)
    whole = draw_adm_batch(model, sample, decoded([]), toy_batch(tmp_path / "whole.npz", 7, 2))
    batch = toy_batch(tmp_path / "cut" / "a.npz", 7, 2)
    with pytest.raises(KeyboardInterrupt):
        draw_adm_batch(model, sample, decoded([], fails_at=3), batch)
    drawing = tmp_path / "cut" / "a.npz.drawing"
    assert drawing.stat().st_size == 4 * batch.image_bytes
    with drawing.open("ab") as file:
        file.write(bytes(batch.image_bytes + 5))  # one image of the next batch, and a part of another
    calls: list[int] = []
    draw_adm_batch(model, sample, decoded(calls), batch)
    assert calls == [2, 1]
    assert batch.path.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in batch.path.parent.iterdir()) == ["a.json", "a.npz"]


@pytest.mark.parametrize("what", ["seed", "weights"])
def test_what_was_drawn_otherwise_is_drawn_anew(what: str, tmp_path: Path) -> None:
    model, sample = toy_model("ec", conditioning="class", num_classes=3), SampleConfig(num_steps=2)
    batch = toy_batch(tmp_path / "a.npz", 4, 2)
    with pytest.raises(KeyboardInterrupt):
        draw_adm_batch(model, sample, decoded([], fails_at=2), batch)
    if what == "seed":
        sample = sample.model_copy(update={"seed": 1})
    else:
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
    calls: list[int] = []
    draw_adm_batch(model, sample, decoded(calls), batch)
    assert calls == [2, 2]


def test_two_processes_do_not_draw_the_same_file(tmp_path: Path) -> None:
    model, sample = toy_model("ec", conditioning="class", num_classes=3), SampleConfig(num_steps=1)
    batch = toy_batch(tmp_path / "a.npz", 2, 2)

    def second(latents: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ConfigError, match="another process draws it"):
            draw_adm_batch(model, sample, decoded([]), batch)
        return latents[:, :3].clamp(-1, 1)

    assert draw_adm_batch(model, sample, second, batch) == batch.path


def test_a_protocol_is_never_beside_other_images_than_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed after the images and before their protocol leaves none, and the next one draws nothing."""
    model, sample = toy_model("ec", conditioning="class", num_classes=3), SampleConfig(num_steps=2)
    batch = toy_batch(tmp_path / "a.npz", 4, 2)
    draw_adm_batch(model, sample, decoded([]), batch)
    other = sample.model_copy(update={"seed": 3})
    with monkeypatch.context() as patch:
        patch.setattr(adm, "_write_protocol", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_adm_batch(model, other, decoded([]), batch)
    assert not (tmp_path / "a.json").exists()
    calls: list[int] = []
    draw_adm_batch(model, other, decoded(calls), batch)
    assert calls == []
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 3


def test_a_part_says_so_and_has_no_labels_of_a_batch(tmp_path: Path) -> None:
    model, sample = toy_model("ec", conditioning="class", num_classes=3), SampleConfig(num_steps=2)
    whole = toy_batch(tmp_path / "a.npz", 4, 2)
    for number in (1, 2):
        draw_adm_batch(model, sample, decoded([]), replace(whole, part=ImagePart(number, 2)))
    part = tmp_path / "a.part2of2.npz"
    assert json.loads(part.with_suffix(".json").read_text())["part"] == "2 of 2"
    with pytest.raises(ConfigError, match=r"a\.part2of2\.npz: is part 2 of 2 of a batch; join its parts first"):
        classes_of_batch(part)
    join_adm_batch(model.config, sample, whole, 2)
    assert "part" not in json.loads((tmp_path / "a.json").read_text())
    assert classes_of_batch(tmp_path / "a.npz") == 3
