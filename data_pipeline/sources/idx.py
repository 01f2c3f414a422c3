"""IDX files, the format of MNIST and of the sets that share its layout (Fashion-MNIST, KMNIST, EMNIST, QMNIST).

A folder holds pairs of files: `train-images-idx3-ubyte` with `train-labels-idx1-ubyte`, and `t10k-` (or `test-`) pairs,
which are held out; each may be compressed (.gz), have a prefix (`emnist-balanced-`) and a dot instead of a hyphen.
"""

import gzip
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.identity import Identity
from data_pipeline.sources.items import Item, Place, Skipped, Unit, hash_text, identity_of, survey_beside, unit_beside
from sharpmoe.errors import DataError

NAMES_FILE = "classnames.txt"  # one name a line, in the order of the labels
_IMAGES = re.compile(r"(?P<before>.*?)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(?P<packed>\.gz)?", re.IGNORECASE)
_SPLITS = {"train": "train", "t10k": "unseen", "test": "unseen"}
_UNSIGNED_BYTE = 8  # type code of the format
_LARGEST = 4 << 30  # bytes of one unpacked file: a header that promises more is damaged
_ROWS = 4096  # images of a unit


class _Pair(NamedTuple):
    """Two files of a set, by name."""

    images: str
    labels: str
    split: str


class IdxSource:
    """Images and labels of IDX files in one folder. Captions are the names of `classnames.txt`, else `class 3`."""

    def __init__(self, folder: Path, pairs: list[_Pair], left_out: list[Skipped]) -> None:
        self._folder, self._pairs, self._left_out = folder, pairs, left_out

    def units(self) -> Iterator[Unit]:
        """Yield the images of each pair, some thousand at a time. Raises DataError for damaged files."""
        names = self._class_names()
        for pair in self._pairs:
            images = _read(str(self._folder / pair.images), 3)
            labels = _read(str(self._folder / pair.labels), 1)
            if len(images) != len(labels):
                raise DataError(f"{self._folder}: {pair.images} holds {len(images)}, {pair.labels} {len(labels)} items")
            if names and int(labels.max(initial=0)) >= len(names):
                raise DataError(
                    f"{self._folder / NAMES_FILE}: {len(names)} names, but {pair.labels} has label {labels.max()}; "
                    "expected one name a line for every label"
                )
            for start in range(0, len(images), _ROWS):
                rows = slice(start, start + _ROWS)
                record = [pair.images, pair.labels, pair.split, start, len(images[rows])]
                content = [hash_text(part[rows].tobytes().hex()) for part in (images, labels)]
                yield Unit(hash_text(json.dumps([record, images.shape[1:], content])), [record])
        yield from unit_beside(self._left_out)

    def identity(self, units: list[str]) -> Identity:
        return identity_of("idx", self._folder, units, names=self._class_names())

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield one item per image, with its label."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        names = self._class_names()
        for images, labels, split, start, count in unit.records:
            side = _read(str(self._folder / images), 3).shape[1:]
            found = _read(str(self._folder / labels), 1)[start : start + count].tolist()
            for row, label in enumerate(found, start):
                yield Item(
                    key=f"{split}-{row:06d}",
                    split=split,
                    captions=((names[label] if names else f"class {label}", 1.0),),
                    image=Place(images, row, math.prod(side)),
                    name=f"{images}[{row}]",
                    label=label,
                    pixels=(int(side[0]), int(side[1])),
                )

    def read(self, item: Item, limit: int | None = None) -> bytes:
        """Return an image as the bytes of a PNG file."""
        content = io.BytesIO()
        pixels = _read(str(self._folder / item.image.file), 3)[item.image.offset]
        Image.fromarray(pixels).save(content, format="PNG", compress_level=1)
        return content.getvalue()[:limit]

    def _class_names(self) -> list[str]:
        path = self._folder / NAMES_FILE
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def find_idx_source(folder: Path) -> IdxSource | None:
    """Return the source of a folder that holds IDX files, None where it holds none.

    Raises DataError where images lack their labels, and where several sets lie in one folder.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [match for name in names if (match := _IMAGES.fullmatch(name))]
    if not found:
        return None
    sets = sorted({match["before"] for match in found})
    if len(sets) > 1:
        raise DataError(
            f"{folder}: holds several sets ({', '.join(s or 'one without prefix' for s in sets)}); keep one"
        )
    pairs = [_pair(folder, match, names) for match in found if not _is_twin(match, names)]
    taken = {NAMES_FILE, *(name for pair in pairs for name in (pair.images, pair.labels))}
    twins = {match.string for match in found} - taken
    left_out = [
        Skipped(name, "the same images are there unpacked" if name in twins else "no IDX file of images", beside=True)
        for name in names
        if name not in taken
    ]
    return IdxSource(folder, sorted(pairs, key=lambda pair: pair.split), left_out)


def _is_twin(match: re.Match[str], names: list[str]) -> bool:
    """Whether a packed file lies beside its unpacked copy."""
    return match["packed"] is not None and match.string[: -len(match["packed"])] in names


def _pair(folder: Path, match: re.Match[str], names: list[str]) -> _Pair:
    stem = re.escape(f"{match['before']}{match['part']}")
    labels = [name for name in names if re.fullmatch(stem + r"-labels[-.]idx1-ubyte(\.gz)?", name, re.IGNORECASE)]
    if not labels:
        expected = match.string.replace("images", "labels").replace("idx3", "idx1")
        raise DataError(f"{folder / match.string}: expected its labels beside it, {expected}")
    return _Pair(match.string, labels[0], _SPLITS[match["part"].lower()])


@cache
def _read(path: str, dimensions: int) -> np.ndarray:
    """Return the array of an IDX file (n,) or (n, h, w) uint8. Raises DataError where it is damaged.

    Read once per process: the files of this family are small (47 MB for 60,000 images).
    """
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            if (
                len(head) < 4 + 4 * dimensions
                or head[:2] != b"\0\0"
                or tuple(head[2:4]) != (_UNSIGNED_BYTE, dimensions)
            ):
                raise DataError(f"{path}: no IDX file of bytes in {dimensions} dimensions (header {head[:4].hex(' ')})")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            content = file.read(min(size, _LARGEST) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(content) != size:
        promised = " x ".join(map(str, shape))
        raise DataError(
            f"{path}: its header promises {promised} bytes, and it does not hold so many; download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
