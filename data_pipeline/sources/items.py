"""What a source of pictures and captions hands out, and what it is asked for."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipeline.identity import Identity
from sharpmoe.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
OTHER_PICTURES = frozenset(
    {".avif", ".eps", ".heic", ".jp2", ".jxl", ".psd", ".svg", ".svgz"}
)  # pictures, not read here
UNIT_RECORDS = 4096  # records listed at a time
_HELD_OUT = 20  # one picture in so many is held out where the source does not say which

Captions = tuple[tuple[str, float], ...]  # (caption, weight), one or more


class Place(NamedTuple):
    """Where the bytes of a picture lie."""

    file: str  # relative to the source's folder, or absolute
    offset: int = 0
    size: int = -1  # bytes; from `offset` on


class Item(NamedTuple):
    """One picture with its captions, not yet decoded."""

    key: str  # letters, digits, - and _ only, because a tar member's key ends at the first dot
    split: str
    captions: Captions
    image: Place
    name: str  # what a message calls it
    label: int = -1
    latent: str = ""  # a cached latent's file, where the source has one
    flip: bool = False  # taken mirrored
    pixels: tuple[int, int] | None = None  # (H, W) upright, where it has been looked at


class Skipped(NamedTuple):
    """One picture that is left out, and why."""

    name: str
    reason: str
    missing: bool = False  # it was named, and is not there


class Unit(NamedTuple):
    """A part of a source that one rank lists at a time."""

    digest: str  # of its contents: equal digests list equal items
    records: list[Any]  # what the source needs to list it; plain JSON


class Source(Protocol):
    """A set of captioned pictures."""

    def units(self) -> Iterator[Unit]:
        """Parts of the set in a fixed order, cheaply. DataError where the set as a whole cannot be used."""
        ...

    def identity(self, units: list[str]) -> Identity:
        """What distinguishes this set from every other, given the digests of its units; free of machine paths."""
        ...

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """The pictures of one unit in a fixed order."""
        ...

    def read(self, item: Item, limit: int | None = None) -> bytes:
        """The bytes of a picture's file, or the first `limit` of them. OSError where they cannot be had."""
        ...


class Listing(NamedTuple):
    """All that a source holds."""

    items: list[Item]
    skipped: list[Skipped]


def listing(source: Source) -> Listing:
    """Every item of a source in memory, for small sets."""
    found = [entry for unit in source.units() for entry in source.survey(unit)]
    items = [entry for entry in found if isinstance(entry, Item)]
    return Listing(items, [entry for entry in found if isinstance(entry, Skipped)])


def to_json(entry: Item | Skipped) -> str:
    """One line."""
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))


def from_json(line: bytes | str) -> Item | Skipped:
    """What `to_json` has written."""
    fields = json.loads(line)
    if len(fields) == len(Skipped._fields):
        return Skipped(*fields)
    item = Item(*fields)
    captions = tuple((text, weight) for text, weight in item.captions)
    pixels = None if item.pixels is None else (item.pixels[0], item.pixels[1])
    return item._replace(captions=captions, image=Place(*item.image), pixels=pixels)


def chunks(records: Iterable[Any]) -> Iterator[Unit]:
    """Units of `UNIT_RECORDS` records each, told apart by a hash of the records."""
    left = iter(records)
    while chunk := list(islice(left, UNIT_RECORDS)):
        yield Unit(hash_text(json.dumps(chunk)), chunk)


def identity_of(kind: str, folder: Path, units: list[str], **settings: Any) -> Identity:
    """Kind, folder's name and a hash over the digests of the units."""
    return {"kind": kind, **settings, "name": folder.resolve().name, "sha256": hash_text(" ".join(units))}


def read_place(root: Path, place: Place, limit: int | None = None) -> bytes:
    """Bytes of a picture below `root`, or the first `limit` of them.

    Raises OSError where the file cannot be opened, DataError where it is not as long as it was when it was listed.
    """
    with (root / place.file).open("rb") as file:
        file.seek(place.offset)
        if limit is not None:
            return file.read(min(limit, place.size))
        content = file.read(place.size if place.offset else place.size + 1)
    if len(content) != place.size:
        raise DataError(f"{root / place.file}: changed since it was listed; prepare into another --out")
    return content


def is_utf8(text: str) -> bool:
    """False where half a surrogate pair stands in it: from JSON, or from a file name in another encoding."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def shown(text: str) -> str:
    """A file's name for messages, whatever its encoding."""
    return text.encode(errors="backslashreplace").decode()


def key_of(path: str) -> str:
    """A sample's key from a path: readable, and unlike every other."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).with_suffix("").as_posix()).strip("-")[:48]
    return f"{stem}-{hash_int(path):016x}"


def held_out(path: str) -> str:
    """The split of a picture whose source names none."""
    return "unseen" if hash_int(path) % _HELD_OUT == 0 else "train"


def hash_int(text: str) -> int:
    """A number from a text, the same on every machine and in every year; splits and orders are drawn from it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hash_text(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
