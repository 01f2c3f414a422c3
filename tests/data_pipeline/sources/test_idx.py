import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.idx import IdxSource
from data_pipeline.sources.items import Item, Skipped
from data_pipeline.sources.open import SourceOptions, open_source
from sharpmoe.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
LABELS = np.array([3, 0, 1, 2, 3, 0, 9], dtype=np.uint8)


def write(path: Path, values: np.ndarray, kind: int = 8) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-images-idx3-ubyte.gz", PIXELS)
    write(tmp_path / "train-labels-idx1-ubyte.gz", LABELS)
    write(tmp_path / "t10k-images-idx3-ubyte", PIXELS[:2] // 2)
    write(tmp_path / "t10k-labels-idx1-ubyte", LABELS[:2])
    return tmp_path


def listed(folder: Path) -> tuple[list[Item], list[Skipped]]:
    source = open_source(SourceOptions(source=str(folder)))
    assert isinstance(source, IdxSource)
    found = [entry for unit in source.units() for entry in source.survey(unit)]
    return [e for e in found if isinstance(e, Item)], [e for e in found if isinstance(e, Skipped)]


def test_images_labels_and_splits_are_those_of_the_files(folder: Path) -> None:
    source = open_source(SourceOptions(source=str(folder)))
    items, skipped = listed(folder)
    assert skipped == []
    assert [item.label for item in items if item.split == "train"] == LABELS.tolist()
    assert [item.label for item in items if item.split == "unseen"] == LABELS[:2].tolist()
    assert len({item.key for item in items}) == 9
    expected = {"train": PIXELS, "unseen": PIXELS[:2] // 2}
    for item in items:
        pixels = np.asarray(Image.open(io.BytesIO(source.read(item))))
        assert np.array_equal(pixels, expected[item.split][item.image.offset])
        assert item.pixels == (5, 4)
        assert source.read(item, 8) == b"\x89PNG\r\n\x1a\n"


def test_held_out_images_that_equal_training_images_stay_held_out(folder: Path) -> None:
    for kind, values in (("images-idx3", PIXELS), ("labels-idx1", LABELS)):
        write(folder / f"t10k-{kind}-ubyte", values)
    digests = [unit.digest for unit in open_source(SourceOptions(source=str(folder))).units()]
    assert len(set(digests)) == len(digests) == 2


def test_captions_are_class_names(folder: Path) -> None:
    assert listed(folder)[0][0].captions == (("class 3", 1.0),)
    before = open_source(SourceOptions(source=str(folder))).identity([])
    (folder / "classnames.txt").write_text("\n".join(f"name {i}" for i in range(10)))
    assert listed(folder)[0][0].captions == (("name 3", 1.0),)
    assert open_source(SourceOptions(source=str(folder))).identity([]) != before
    (folder / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="2 names, but train-labels-idx1-ubyte.gz has label 9"):
        listed(folder)


def test_a_prefix_and_dots_are_names_too(tmp_path: Path) -> None:
    write(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz", PIXELS)
    write(tmp_path / "emnist-letters-train-labels-idx1-ubyte.gz", LABELS)
    write(tmp_path / "emnist-letters-test-images.idx3-ubyte", PIXELS[:3])
    write(tmp_path / "emnist-letters-test-labels.idx1-ubyte", LABELS[:3])
    items, _ = listed(tmp_path)
    assert [item.split for item in items].count("unseen") == 3


def test_what_is_not_taken_is_listed(folder: Path) -> None:
    write(folder / "train-images-idx3-ubyte", PIXELS)
    (folder / "notes.rst").write_text("")
    items, skipped = listed(folder)
    assert len(items) == 9
    assert {entry.name: entry.reason for entry in skipped} == {
        "notes.rst": "no IDX file of images",
        "train-images-idx3-ubyte.gz": "the same images are there unpacked",
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "train-labels-idx1-ubyte.gz").unlink(), "expected its labels beside it, train-labels-idx1"),
        (lambda f: write(f / "train-labels-idx1-ubyte.gz", LABELS[:5]), "holds 7, train-labels-idx1-ubyte.gz 5 items"),
        (lambda f: write(f / "t10k-images-idx3-ubyte", PIXELS, kind=13), "no IDX file of bytes in 3 dimensions"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"<html>"), "no IDX file of bytes in 3 dimensions"),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""), "no IDX file of bytes in 3 dimensions"),
        (lambda f: cut(f / "t10k-images-idx3-ubyte"), "its header promises 2 x 5 x 4 bytes"),
        (lambda f: cut(f / "train-images-idx3-ubyte.gz"), "cannot be read"),
        (lambda f: write(f / "kuzushiji-train-images-idx3-ubyte", PIXELS), "holds several sets"),
        (lambda f: (f / "classnames.txt").write_bytes(b"\xff\xfe"), "cannot be read as UTF-8"),
    ],
)
def test_damaged_sets_are_refused_in_one_line(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message) as raised:
        listed(folder)
    assert "\n" not in str(raised.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
