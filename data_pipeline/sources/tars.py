"""Existing WebDataset tars as a source: images with .txt, .json and .cls members."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.identity import Identity
from data_pipeline.sources import captions, safetar
from data_pipeline.sources.items import (
    IMAGE_SUFFIXES,
    Captions,
    Item,
    Place,
    Skipped,
    Unit,
    hash_text,
    held_out,
    identity_of,
    key_of,
    read_place,
)
from sharpmoe.errors import DamageError, DataError

_IMAGES = tuple(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
_SUFFIXES = frozenset({*_IMAGES, "txt", "json", "cls"})
_ENDS = 1 << 16  # bytes at both ends that distinguish a tar from another of the same name and size


class TarSource:
    """Images inside plain tars, each captioned by KEY.txt or KEY.json of the same tar; KEY.cls holds a label."""

    def __init__(self, folder: Path, tars: list[Path]) -> None:
        """`tars`: files below `folder`."""
        self._folder, self._tars = folder, tars

    def units(self) -> Iterator[Unit]:
        """Yield one unit per tar, with a digest of its name, size and the bytes at both ends."""
        for tar in self._tars:
            name = tar.relative_to(self._folder).as_posix()
            yield Unit(hash_text(json.dumps([name, *_fingerprint(tar)])), [name])

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over all tars."""
        return identity_of("tars", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield samples with an image and a caption; those before the damage of a damaged tar are kept."""
        for name in unit.records:
            path = self._folder / name
            try:
                for sample in safetar.samples(path, _SUFFIXES):
                    if isinstance(sample, safetar.Refusal):
                        yield Skipped(f"{name}/{sample.name}", sample.reason)
                    else:
                        yield self._entry(name, sample)
            except DamageError as error:
                yield Skipped(name, f"{str(error).removeprefix(f'{path}: ')}; what follows is left out")

    def _entry(self, tar: str, sample: safetar.TarSample) -> Item | Skipped:
        image = next((sample.members[suffix] for suffix in _IMAGES if suffix in sample.members), None)
        name = f"{tar}/{sample.key}"
        if image is None:
            return Skipped(name, "no picture with this key")
        found = self._captions(tar, sample)
        if isinstance(found, str):
            return Skipped(name, found)
        path = f"{name}.{image.suffix}"
        place = Place(tar, image.offset, image.size)
        return Item(
            key=key_of(path),
            split=held_out(path),
            captions=found,
            image=place,
            name=path,
            label=self._label(tar, sample),
        )

    def _captions(self, tar: str, sample: safetar.TarSample) -> Captions | str:
        """Return the captions of .json where it lists several, else of .txt, else of .json."""
        text, tree = sample.members.get("txt"), sample.members.get("json")
        found: Captions | str = "no caption: neither .txt nor .json"
        if tree is not None:
            found = captions.from_json_bytes(safetar.read_member(self._folder / tar, tree), f"{sample.key}.json")
        if text is not None and (isinstance(found, str) or len(found) < 2):
            found = captions.from_text_bytes(safetar.read_member(self._folder / tar, text), f"{sample.key}.txt")
        return found

    def _label(self, tar: str, sample: safetar.TarSample) -> int:
        member = sample.members.get("cls")
        text = b"" if member is None or member.size > 20 else safetar.read_member(self._folder / tar, member).strip()
        return int(text) if text.isdigit() else -1

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._folder, item.image, limit)


def _fingerprint(tar: Path) -> tuple[int, str]:
    try:
        size = tar.stat().st_size
        with tar.open("rb") as file:
            start = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            return size, hashlib.sha256(start + file.read()).hexdigest()
    except OSError as error:
        raise DataError(f"{tar}: cannot be read ({error.strerror})") from None
