"""Existing WebDataset tars as a source: images with .txt, .json and .cls members."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.identity import Identity
from data_pipeline.sources import captions, safetar
from data_pipeline.sources.files import LOCAL, Files, read_place
from data_pipeline.sources.items import (
    IMAGE_SUFFIXES,
    OTHER_IMAGES,
    SPLIT_FOLDERS,
    Captions,
    Item,
    Place,
    Skipped,
    Unit,
    hash_text,
    held_out,
    identity_of,
    key_of,
    survey_beside,
    unit_beside,
)
from data_pipeline.sources.walk import MAP_SUFFIXES, OtherFiles, text_lines, unused_maps
from sharpmoe.errors import DamageError, DataError

_IMAGES = tuple(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
_TEXTS = ("txt", "caption")
_MAPS = tuple(f"saliency{suffix}" for suffix in MAP_SUFFIXES)
_SUFFIXES = frozenset({*_IMAGES, *_MAPS, *(suffix[1:] for suffix in OTHER_IMAGES), *_TEXTS, "json", "cls"})
_CLASS_NAMES = "classnames.txt"  # beside the tars: the name of class 0, of class 1, ..., one a line
_ENDS = 1 << 16  # bytes at both ends that distinguish a tar from another of the same name and size


def _split_of(tar: str) -> str:
    """Return the split of the images of a tar of a source with held-out tars, by the first folder of its path."""
    top, below, _ = tar.partition("/")
    return SPLIT_FOLDERS.get(top.lower(), "train") if below else "train"


class TarSource:
    """Images inside plain tars, each captioned by KEY.txt, KEY.caption or KEY.json of the same tar.

    KEY.cls holds a label. An image that has only a label is captioned by its line of classnames.txt beside the tars,
    or as `class 17` where there is no such file. KEY.saliency.png is the saliency map of the image. Where tars are
    below val/, validation/, valid/ or test/ in the folder itself, exactly their images are held out.
    """

    def __init__(
        self,
        folder: Path,
        tars: list[Path],
        left_out: Sequence[Skipped] = (),
        files: Files = LOCAL,
        maps: bool = False,
    ) -> None:
        """`tars`: files below `folder`; `left_out`: what else it holds and is not taken; `maps`: take saliency maps."""
        self._folder, self._tars, self._left_out, self._files, self._maps = folder, tars, left_out, files, maps
        self._names: list[str] | None = None
        self._apart = any(_split_of(self._name(tar)) == "unseen" for tar in tars)

    def units(self) -> Iterator[Unit]:
        """Yield one unit per tar, with a digest of its name, size and the bytes at both ends."""
        for tar in self._tars:
            name = self._name(tar)
            split = [_split_of(name)] if self._apart else []  # else drawn for every image
            yield Unit(hash_text(json.dumps([name, *self._fingerprint(tar), *split])), [name])
        yield from unit_beside(self._left_out)

    def _name(self, tar: Path) -> str:
        return tar.relative_to(self._folder).as_posix()

    def _fingerprint(self, tar: Path) -> tuple[int, str]:
        size = self._files.size(tar)
        if isinstance(size, str):
            raise DataError(f"{tar}: {size}")
        try:
            with self._files.open(tar) as file:
                start = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                return size, hashlib.sha256(start + file.read()).hexdigest()
        except OSError as error:
            raise DataError(f"{tar}: cannot be read ({error.strerror})") from None

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over all tars."""
        return identity_of("tars", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield samples with an image and a caption; those before the damage of a damaged tar are kept."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        for name in unit.records:
            path, unused = self._folder / name, 0
            others = OtherFiles("only pictures with .txt, .caption, .json or .cls are")
            try:
                for sample in safetar.samples(path, _SUFFIXES, ignored=others.add, files=self._files):
                    if isinstance(sample, safetar.Refusal):
                        yield Skipped(f"{name}/{sample.name}", sample.reason)
                    elif sample.part_of and not _is_whole(sample):
                        for suffix in sample.members:
                            others.add(f"{sample.key}.{suffix}", sample.key.removeprefix(sample.part_of))
                    else:
                        unused += not self._maps and _map_in(sample) is not None
                        yield self._entry(name, sample)
            except DamageError as error:
                yield Skipped(name, f"{str(error).removeprefix(f'{path}: ')}; what follows is left out")
            yield from others.left_out(f"{name}/")
            yield from unused_maps(unused, f"{name}/")

    def _entry(self, tar: str, sample: safetar.TarSample) -> Item | Skipped:
        image = next((sample.members[suffix] for suffix in _IMAGES if suffix in sample.members), None)
        name = f"{tar}/{sample.key}"
        if image is None:
            other = next((f".{suffix}" for suffix in sample.members if f".{suffix}" in OTHER_IMAGES), None)
            reason = None if other is None else f"{other} is not read; expected {' '.join(sorted(IMAGE_SUFFIXES))}"
            return Skipped(name, reason or "no picture with this key")
        label = self._label(tar, sample)
        found = self._captions(tar, sample)
        if not sample.members.keys() & {*_TEXTS, "json"}:
            if isinstance(label, str):
                found = f"no caption, and its {label}"
            elif label >= 0:
                found = ((self._class_name(label), 1.0),)
        if isinstance(found, str):
            return Skipped(name, found)
        label = -1 if isinstance(label, str) else label
        path = f"{name}.{image.suffix}"
        place = Place(tar, image.offset, image.size)
        marked = _map_in(sample) if self._maps else None
        return Item(
            key=key_of(path),
            split=_split_of(tar) if self._apart else held_out(path),
            captions=found,
            image=place,
            name=path,
            label=label,
            saliency=None if marked is None else Place(tar, marked.offset, marked.size),
        )

    def _class_name(self, label: int) -> str:
        if self._names is None:
            path = self._folder / _CLASS_NAMES
            self._names = text_lines(path) if path.is_file() else []
        name = self._names[label].strip() if label < len(self._names) else ""
        return name or f"class {label}"

    def _captions(self, tar: str, sample: safetar.TarSample) -> Captions | str:
        """Return the captions of .json where it lists several, else of .txt or .caption, else of .json."""
        text = next((sample.members[suffix] for suffix in _TEXTS if suffix in sample.members), None)
        tree = sample.members.get("json")
        found: Captions | str = "no caption: neither .txt nor .json"
        if tree is not None:
            found = captions.from_json_bytes(
                safetar.read_member(self._folder / tar, tree, self._files), f"{sample.key}.json"
            )
        if text is not None and (isinstance(found, str) or len(found) < 2):
            content = safetar.read_member(self._folder / tar, text, self._files)
            found = captions.from_text_bytes(content, f"{sample.key}.{text.suffix}")
        return found

    def _label(self, tar: str, sample: safetar.TarSample) -> int | str:
        """Return the label of .cls, -1 where there is none, or what is wrong with it."""
        member = sample.members.get("cls")
        if member is None:
            return -1
        content = safetar.read_member(self._folder / tar, member, self._files) if member.size <= 64 else b"?"
        return captions.label_of(content.decode(errors="replace"))

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._files, self._folder, item.image, limit)


def _map_in(sample: safetar.TarSample) -> safetar.Member | None:
    return next((sample.members[suffix] for suffix in _MAPS if suffix in sample.members), None)


def _is_whole(sample: safetar.TarSample) -> bool:
    """Return whether a sample has an image and something that captions it."""
    found = sample.members.keys()
    return bool(found & set(_IMAGES)) and bool(found & {*_TEXTS, "json", "cls"})
