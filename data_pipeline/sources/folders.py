"""Images in folders: with a caption beside each, or with one folder per class as in ImageNet."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.identity import Identity
from data_pipeline.sources import captions
from data_pipeline.sources.items import (
    IMAGE_SUFFIXES,
    OTHER_IMAGES,
    Item,
    Place,
    Skipped,
    Unit,
    held_out,
    identity_of,
    is_utf8,
    key_of,
    read_place,
    shown,
    units_of,
)
from sharpmoe.errors import DataError

_NAMES_FILE = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", as Kaggle's ImageNet has it


class SidecarSource:
    """Images below one folder, each captioned by NAME.txt or NAME.json beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def units(self) -> Iterator[Unit]:
        """Yield images in the order of their folders and names, with sizes and captions."""
        empty = True
        for unit in units_of(self._records()):
            empty = empty and all(isinstance(found, str) for _, _, found in unit.records)
            yield unit
        if empty:
            raise DataError(
                f"{self._folder}: no captioned image found; expected captions.jsonl, .csv or .parquet, or a NAME.txt "
                f"beside every NAME with one of {' '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _records(self) -> Iterator[Any]:
        """Yield [file, bytes, captions or why there are none]."""
        for folder, folders, names in os.walk(self._folder):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                suffix, file = path.suffix.lower(), path.relative_to(self._folder).as_posix()
                if suffix in OTHER_IMAGES:
                    yield [file, 0, f"{suffix} is not read; expected {' '.join(sorted(IMAGE_SUFFIXES))}"]
                elif suffix in IMAGE_SUFFIXES and path.is_file():
                    yield [file, path.stat().st_size, captions.beside(path)]

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every image's path, captions and size (contents are not read)."""
        return identity_of("folder", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield images with captions; those without are skipped."""
        for file, size, found in unit.records:
            if not is_utf8(file):
                yield Skipped(shown(file), "its name is not UTF-8")
            elif isinstance(found, str):
                yield Skipped(file, found)
            else:
                place = Place(file, 0, size)
                yield Item(key=key_of(file), split=held_out(file), captions=found, image=place, name=file)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._folder, item.image, limit)


class ClassFolderSource:
    """Images whose class is their folder: FOLDER/CLASS/NAME, or FOLDER/train/CLASS/NAME with FOLDER/val/CLASS/NAME.

    Labels count the classes in the order of their names, as torchvision and every published trainer do. Captions are
    the first name of the class in LOC_synset_mapping.txt, where the folder holds that file, else the folder's name.
    Without `val`, one image in twenty, by hash of its path, is held out.
    """

    def __init__(self, folder: Path, moments: Path | None = None, flip: bool = False) -> None:
        """`moments`: folder of ProMoE's cached CLASS/NAME.latent.npz files; `flip`: add training images mirrored."""
        for path, what in ((folder, "--source"), (moments, "--moments")):
            if path is not None and not path.is_dir():
                raise DataError(f"{path}: no such folder; {what} takes a folder of class folders")
        self._folder, self._moments, self._flip = folder, moments, flip

    def units(self) -> Iterator[Unit]:
        """Yield images class by class, with their sizes."""
        empty = True
        for unit in units_of(self._records()):
            empty = False
            yield unit
        if empty:
            raise DataError(f"{self._folder}: no image found; expected CLASS/NAME.jpg, one folder per class")

    def _records(self) -> Iterator[Any]:
        """Yield [folder of the class folders, file below it, split or "", caption, label, bytes]."""
        train = self._folder / "train" if (self._folder / "train").is_dir() else self._folder
        classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not path.name.startswith("."))
        names = _class_names(self._folder)
        for root, split in self._roots(train):
            within = root.relative_to(self._folder).as_posix()
            for label, name in enumerate(classes):
                for path in sorted((root / name).rglob("*")):
                    if path.suffix.lower() in IMAGE_SUFFIXES:
                        file = path.relative_to(root).as_posix()
                        yield [within, file, split, names.get(name, name), label, path.stat().st_size]

    def _roots(self, train: Path) -> list[tuple[Path, str]]:
        """Return folders of class folders with their split; "" where the split is drawn."""
        val = self._folder / "val"
        return [(train, "train"), (val, "unseen")] if val.is_dir() else [(train, "")]

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every image's path, label and size (contents are not read)."""
        settings = {"moments": self._moments is not None, "flip": self._flip}
        return identity_of("classes", self._folder, units, **settings)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield every image, and its mirror image for training; images whose latent is not cached are skipped."""
        for within, file, split, caption, label, size in unit.records:
            path = Path(within, file).as_posix()
            if not is_utf8(path):
                yield Skipped(shown(path), "its name is not UTF-8")
                continue
            latent = None if self._moments is None else (self._moments / file).with_suffix(".latent.npz")
            if latent is not None and not latent.is_file():
                yield Skipped(path, "no cached latent")
                continue
            split = split or held_out(file)
            place, cached = Place(path, 0, size), "" if latent is None else str(latent)
            item = Item(
                key=key_of(file),
                split=split,
                captions=((caption, 1.0),),
                image=place,
                name=path,
                label=label,
                latent=cached,
            )
            yield item
            if self._flip and split == "train":
                yield replace(item, key=f"{item.key}-flip", flip=True)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._folder, item.image, limit)


def _class_names(folder: Path) -> dict[str, str]:
    """Read the first name of every class from LOC_synset_mapping.txt; empty where the file does not exist."""
    path = folder / _NAMES_FILE
    if not path.is_file():
        return {}
    lines = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {key: names.split(",")[0].strip() for key, _, names in lines}
