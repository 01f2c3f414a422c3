import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.write import prepare_shards
from sharpmoe.errors import DataError
from sharpmoe.evaluation.image_sets import ImageSet, open_images, read_statistics
from tests.fixtures_data import QUIET, ShapesSource

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def stacked(images: ImageSet, size: int) -> np.ndarray:
    found = list(images.batches(size))
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    assert all(batch.dtype == torch.uint8 for batch in found)
    return torch.cat(found).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_turn(save, tmp_path: Path) -> None:
    save(tmp_path / "samples.npz", arr_0=PIXELS, arr_1=np.arange(7))
    images = open_images(str(tmp_path / "samples.npz"))
    assert (images.name, images.num_images) == ("samples", 7)
    for size in (1, 3, 7, 20):
        assert np.array_equal(stacked(images, size), PIXELS)
    assert len(images.about["sha256"]) == 64


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for number, pixels in enumerate(PIXELS):
        path = tmp_path / f"{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "notes.txt").write_text("not a picture")
    images = open_images(str(tmp_path))
    assert images.num_images == 7
    assert np.array_equal(stacked(images, 4), PIXELS[[0, 2, 4, 6, 1, 3, 5]])


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0, ..., 0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[1]).convert("RGBA").save(tmp_path / "b.png")
    assert np.array_equal(stacked(open_images(str(tmp_path)), 2)[0], PIXELS[0, ..., :1].repeat(3, -1))


def test_shards_are_decoded(tmp_path: Path) -> None:
    prepare_shards(ShapesSource(24), tmp_path, Recipe(encoder={"kind": "hash", "width": 8, "max_length": 8}), QUIET)
    images = open_images(f"{tmp_path}:train")
    assert images.num_images == 20
    pixels = stacked(images, 6)
    assert pixels.shape == (20, 64, 64, 3)
    assert pixels.std() > 10
    assert open_images(str(tmp_path)).num_images == 4  # unseen
    with pytest.raises(DataError, match="nosuch"):
        open_images(f"{tmp_path}:nosuch")


def test_statistics_are_those_of_the_file(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance, arr_0=PIXELS)
    found = read_statistics(tmp_path / "a.npz")
    assert found is not None
    assert found.pool is not None
    assert np.array_equal(found.pool.mean, mean)
    assert found.spatial is None
    np.savez(tmp_path / "b.npz", arr_0=PIXELS)
    assert read_statistics(tmp_path / "b.npz") is None
    np.savez(tmp_path / "c.npz", mu=mean, sigma=np.eye(4))
    with pytest.raises(DataError, match=r"mean \(3,\) does not fit covariance \(4, 4\)"):
        read_statistics(tmp_path / "c.npz")
    assert read_statistics(tmp_path) is None


@pytest.mark.parametrize("mean", [np.array([1.0, np.nan]), np.array([np.inf, 0.0]), np.array([1, 2])])
def test_statistics_that_are_no_finite_numbers_are_refused(mean: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=mean, sigma=np.eye(2))
    with pytest.raises(DataError, match=r"a.npz: mu \(\w+\) is not all finite numbers"):
        read_statistics(tmp_path / "a.npz")


def whole(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, arr_0=array)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no images found"),
        (b"<html>", "no images found"),
        (whole(PIXELS.astype(np.float32)), "arr_0 is float32"),
        (whole(PIXELS[..., :1]), r"expected uint8 \(N, H, W, 3\)"),
        (whole(PIXELS[:0]), r"expected uint8 \(N, H, W, 3\)"),
        (whole(PIXELS.transpose(3, 2, 1, 0)), "Fortran"),
    ],
)
def test_what_is_no_batch_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        open_images(str(tmp_path / "a.npz"))
    assert "\n" not in str(raised.value)


def test_a_picture_is_never_passed_to_another_program(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")  # Pillow would start Ghostscript, by the content alone
    with pytest.raises(DataError, match="cannot identify image file"):
        next(open_images(str(tmp_path)).batches(1))


def test_other_faults_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no set of images"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no pictures found"):
        open_images(str(tmp_path))
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[0, :4]).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: 5 x 4 pixels, others of the set 5 x 6"):
        list(open_images(str(tmp_path)).batches(4))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        list(open_images(str(tmp_path)).batches(4))
