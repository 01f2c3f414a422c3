"""ImageNet and sets like it: one folder per class, optionally with latents that another project has cached."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.sources import IMAGE_SUFFIXES, Item, Listing, Skipped, hash_int
from sharpmoe.errors import DataError

NAMES_FILE = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", as Kaggle's ImageNet has it


class ClassFolderSource:
    """Images whose class is their folder: FOLDER/CLASS/NAME, or FOLDER/train/CLASS/NAME with FOLDER/val/CLASS/NAME.

    Labels count the classes in the order of their names, as torchvision and every published trainer do. Captions are
    the first name of the class in LOC_synset_mapping.txt, where the folder holds that file, else the folder's name.
    Without `val`, one image in twenty, by hash of its path, is held out.
    """

    def __init__(self, folder: Path, moments: Path | None = None, flip: bool = False) -> None:
        """`moments`: ProMoE's cached CLASS/NAME.latent.npz files; `flip`: take training images mirrored as well."""
        for path, what in ((folder, "--source"), (moments, "--moments")):
            if path is not None and not path.is_dir():
                raise DataError(f"{path}: no such folder; {what} takes a folder of class folders")
        self._folder, self._moments, self._flip = folder, moments, flip
        self._listing: Listing | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Hash over every item's path, label and file size (contents are not read)."""
        digest = hashlib.sha256()
        for item in self.listing().items:
            assert isinstance(item.image, Path)
            digest.update(json.dumps([item.key, item.caption, item.label, item.image.stat().st_size]).encode())
        kind = {"kind": "classes", "moments": self._moments is not None, "flip": self._flip}
        return {**kind, "name": self._folder.resolve().name, "sha256": digest.hexdigest()}

    def listing(self) -> Listing:
        """List the folder once; raises DataError where it holds no class folders with images."""
        if self._listing is None:
            self._listing = self._list()
            if not self._listing.items:
                raise DataError(f"{self._folder}: no image found; expected CLASS/NAME.jpg, one folder per class")
        return self._listing

    def _list(self) -> Listing:
        train = self._folder / "train" if (self._folder / "train").is_dir() else self._folder
        classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not path.name.startswith("."))
        captions = class_names(self._folder)
        items: list[Item] = []
        skipped: list[Skipped] = []
        for root, split in self._roots(train):
            for label, name in enumerate(classes):
                like = Item("", split, captions.get(name, name), b"", "", label)
                for path in sorted((root / name).rglob("*")):
                    if path.suffix.lower() in IMAGE_SUFFIXES:
                        found = self._items(path, root, like)
                        items += found
                        skipped += [] if found else [Skipped(self._name(path), "no cached latent")]
        return Listing(items, skipped)

    def _roots(self, train: Path) -> list[tuple[Path, str]]:
        """Folders of class folders with their split; "" where the split is drawn."""
        val = self._folder / "val"
        return [(train, "train"), (val, "unseen")] if val.is_dir() else [(train, "")]

    def _items(self, path: Path, root: Path, like: Item) -> list[Item]:
        """One image, and its mirror image where it is trained on; nothing where its latent is not cached."""
        file = path.relative_to(root)
        latent = None if self._moments is None else self._moments / file.with_suffix(".latent.npz")
        if latent is not None and not latent.is_file():
            return []
        place = hash_int(file.as_posix())
        split = like.split or ("unseen" if place % 20 == 0 else "train")
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", file.with_suffix("").as_posix())[:48]
        item = like._replace(key=f"{stem}-{place:016x}", split=split, image=path, name=self._name(path), latent=latent)
        mirrored = item._replace(key=f"{item.key}-flip", flip=True)
        return [item, mirrored] if self._flip and split == "train" else [item]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def class_names(folder: Path) -> dict[str, str]:
    """Read the first name of every class from LOC_synset_mapping.txt; empty where the folder has none."""
    path = folder / NAMES_FILE
    if not path.is_file():
        return {}
    lines = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {key: names.split(",")[0].strip() for key, _, names in lines}
