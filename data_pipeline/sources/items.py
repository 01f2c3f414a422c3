"""What a source of images and captions is, and the records that it provides."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipeline.identity import Identity

IMAGE_SUFFIXES = frozenset({".apng", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Suffixes of image files that are not read; a source lists them as skipped.
OTHER_IMAGES = frozenset({".avif", ".eps", ".heic", ".jp2", ".jxl", ".psd", ".svg", ".svgz"})
UNIT_RECORDS = 4096  # records of a unit
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Top-level folders of splits, for every source, and the split that they become; the order is that of their tables.
SPLIT_FOLDERS = {"train": "train", "validation": "unseen", "valid": "unseen", "val": "unseen", "test": "unseen"}
_HELD_OUT = 20  # one image in so many is held out where the source does not name splits

Captions = tuple[tuple[str, float], ...]  # (caption, weight), one or more


class Place(NamedTuple):
    """Where the bytes of an image file are."""

    file: str  # relative to the source's folder, or absolute
    offset: int = 0
    size: int = -1  # bytes; from `offset` on


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image with its captions, not yet decoded. The order of the fields is that of the listings on disk."""

    key: str  # letters, digits, - and _ only, because a tar member's key ends at the first dot
    split: str
    captions: Captions
    image: Place
    name: str  # in messages
    label: int = -1
    latent: str = ""  # a cached latent's file, where the source has one
    flip: bool = False  # mirror the image
    pixels: tuple[int, int] | None = None  # (H, W) upright, where it has been read
    saliency: Place | None = None  # the file of its saliency map, where the source has one and was asked for it


_ITEM_FIELDS = tuple(entry.name for entry in fields(Item))


class Skipped(NamedTuple):
    """An image, or something else that a source has seen, that is left out, and why.

    Both texts are stored with the shards: changed words change their bytes.
    """

    name: str
    reason: str
    missing: bool = False  # the source names it, and it does not exist
    beside: bool = False  # no picture of the set went bad: outside --max-bad-share


class Unit(NamedTuple):
    """A part of a source that one rank lists at a time."""

    digest: str  # of its contents: equal digests list equal items
    records: list[Any]  # what the source needs to list it; plain JSON
    beside: bool = False  # it names only what is left out beside the images: not part of the source's identity


class ImageSource(Protocol):
    """A set of captioned images. A new one needs a row in `sources.open.SOURCES`."""

    def units(self) -> Iterator[Unit]:
        """Yield parts of the set in a fixed order, fast. Raises DataError where the set cannot be used at all."""
        ...

    def identity(self, units: list[str]) -> Identity:
        """Return what distinguishes this set from others, given the digests of its units; without machine paths."""
        ...

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield the images of one unit in a fixed order."""
        ...

    def read(self, item: Item, limit: int | None = None) -> bytes:
        """Return the bytes of an image file, or the first `limit` of them. Raises OSError where it cannot be read."""
        ...


def to_json(entry: Item | Skipped) -> str:
    """Return one line: the fields as a JSON array."""
    values = [getattr(entry, name) for name in _ITEM_FIELDS] if isinstance(entry, Item) else [*entry]
    if isinstance(entry, Item) and entry.saliency is None:
        values.pop()  # the last field: listings without maps are as every version has written them
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def from_json(line: bytes | str) -> Item | Skipped:
    """Read a line of `to_json`."""
    values = json.loads(line)
    if len(values) <= len(Skipped._fields):
        return Skipped(*values)
    named = dict(zip(_ITEM_FIELDS, values, strict=False))
    named["captions"] = tuple((text, weight) for text, weight in named["captions"])
    named["image"] = Place(*named["image"])
    named["pixels"] = None if named["pixels"] is None else tuple(named["pixels"])
    named["saliency"] = Place(*named["saliency"]) if named.get("saliency") else None
    return Item(**named)


def units_of(records: Iterable[Any]) -> Iterator[Unit]:
    """Yield units of `UNIT_RECORDS` records each, with a hash of the records as their digest."""
    left = iter(records)
    while part := list(islice(left, UNIT_RECORDS)):
        yield Unit(hash_text(json.dumps(part)), part)


def unit_beside(left_out: Iterable[Skipped]) -> Iterator[Unit]:
    """Yield one unit of what is left out beside the images; none where there is nothing."""
    records: list[Any] = [[entry.name, entry.reason] for entry in left_out]
    if records:
        yield Unit(hash_text(json.dumps(["left out", records])), records, beside=True)


def survey_beside(unit: Unit) -> Iterator[Skipped]:
    """Yield the records of `unit_beside`."""
    for name, reason in unit.records:
        yield Skipped(shown(name), reason, beside=True)


def source_identity(source: ImageSource, units: Iterable[Unit]) -> tuple[Identity, list[str]]:
    """Return the identity of a source, which its units of images decide, and the digests of all its units."""
    found = [(unit.digest, unit.beside) for unit in units]
    return source.identity([digest for digest, beside in found if not beside]), [digest for digest, _ in found]


def identity_of(kind: str, folder: Path, units: list[str], **settings: Any) -> Identity:
    """Return the kind, the settings, the folder's name and a hash over the digests of the units."""
    return {"kind": kind, **settings, "name": folder.resolve().name, "sha256": hash_text(" ".join(units))}


def is_utf8(text: str) -> bool:
    """Return False where text holds half a surrogate pair: from JSON, or from a file name in another encoding."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def shown(text: str) -> str:
    """Return a file's name for messages: on one line, without control characters, whatever its encoding."""
    plain = _CONTROL.sub(lambda match: repr(match.group())[1:-1], text)
    return plain.encode(errors="backslashreplace").decode()


def key_of(path: str) -> str:
    """Return a sample's key from a path: readable and unique."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).with_suffix("").as_posix()).strip("-")[:48]
    return f"{stem}-{hash_int(path):016x}"


def held_out(path: str) -> str:
    """Return the split of an image whose source does not name splits: one in 20 is `unseen`, by hash of its path."""
    return "unseen" if hash_int(path) % _HELD_OUT == 0 else "train"


def hash_int(text: str) -> int:
    """Return a 64-bit number from a text, the same on every machine; splits and orders are drawn from it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hash_text(text: str) -> str:
    """Return the sha256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
