"""Images in folders: with a caption beside each, or with one folder per class as in ImageNet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.identity import Identity
from data_pipeline.sources import captions
from data_pipeline.sources.files import LOCAL, Files, read_place
from data_pipeline.sources.items import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDERS,
    Item,
    Place,
    Skipped,
    Unit,
    held_out,
    identity_of,
    is_utf8,
    key_of,
    shown,
    survey_beside,
    unit_beside,
    units_of,
)
from data_pipeline.sources.walk import (
    LINK_TO_NOWHERE,
    OtherFiles,
    file_size,
    held_out_folders,
    is_double,
    is_image,
    is_saliency_map,
    other_image,
    saliency_map_of,
    split_of_folder,
    text_lines,
    unused_maps,
    walk_folders,
)
from sharpmoe.errors import DataError

_NAMES_FILE = "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", as Kaggle's ImageNet has it
# The first that exists beside train/, `val` before others; test/ of a folder of classes holds pictures without class.
_HELD_OUT_FOLDERS = tuple(
    sorted((name for name in SPLIT_FOLDERS if name not in ("train", "test")), key=lambda name: name != "val")
)
_TAKEN = "pictures with NAME.txt, NAME.caption or NAME.json are"


class SidecarSource:
    """Images below one folder, each captioned by NAME.txt, NAME.caption or NAME.json beside it.

    NAME.saliency.png without a caption of its own is the saliency map of NAME, and no image. Where val/, validation/,
    valid/ or test/ in the folder itself hold a captioned image, exactly the images below them are held out; else one
    in twenty is, by hash of its path.
    """

    def __init__(
        self, folder: Path, left_out: Sequence[Skipped] = (), files: Files = LOCAL, maps: bool = False
    ) -> None:
        """`left_out`: what else is known to be in the folder and not taken; `maps`: take saliency maps."""
        self._folder, self._left_out, self._files, self._maps = folder, left_out, files, maps

    def units(self) -> Iterator[Unit]:
        """Yield images in the order of their folders and names, with sizes and captions."""
        beside = list(self._left_out)
        empty, first = True, ""
        for unit in units_of(self._records(beside)):
            without = next((f"{file}: {found}" for file, _, found, *_ in unit.records if isinstance(found, str)), "")
            first, empty = first or without, empty and all(isinstance(found, str) for _, _, found, *_ in unit.records)
            yield unit
        if empty:
            seen = first or next((f"{entry.name}: {entry.reason}" for entry in beside), "")
            raise DataError(
                f"{self._folder}: no captioned image found{f' ({shown(seen)})' if seen else ''}; expected "
                "captions.jsonl, .csv or .parquet, or a NAME.txt beside every NAME with one of "
                f"{' '.join(sorted(IMAGE_SUFFIXES))}"
            )
        yield from unit_beside(beside)

    def _records(self, beside: list[Skipped]) -> Iterator[Any]:
        """Yield [file, bytes, captions or why there are none]; add to `beside` what is no image.

        The place of a map follows where there is one, and the split where it is not drawn.
        """
        others, unused = OtherFiles(f"only {_TAKEN}"), 0
        apart = [path.resolve() for path in held_out_folders(self._folder) if has_captioned_image(path)]
        for found in walk_folders(self._folder):
            if isinstance(found, Skipped):
                beside.append(found)
                continue
            folder, names = found
            files = dict.fromkeys(names, False)  # whether a caption file or a map has its image
            maps = {name for name in names if is_saliency_map(name) and captions.caption_file(name, files) is None}
            split = split_of_folder(folder, apart)
            for name in names:
                if is_image(name) and name not in maps:
                    record = self._record(folder / name, files)
                    yield [*record, split] if apart else record
            for name, used in files.items():
                if not used and not is_image(name):
                    self._note(folder / name, beside, others)
            unused += 0 if self._maps else len(maps)
            beside += [_alone(folder / name, self._folder) for name in sorted(maps) if self._maps and not files[name]]
        beside += [*others.left_out(), *unused_maps(unused)]

    def _record(self, path: Path, files: dict[str, bool]) -> Any:
        file = path.relative_to(self._folder).as_posix()
        caption = captions.caption_file(path.name, files)
        if caption is not None:
            files[caption] = True
        size, other = file_size(path), other_image(path.name)
        if other is not None:
            return [file, 0, other]
        if isinstance(size, str):
            return [file, 0, size]
        missing = f"no caption in {path.with_suffix('.txt').name}"
        record = [file, size, missing if caption is None else captions.from_file(path.parent / caption)]
        found = saliency_map_of(path.name, files.__contains__) if self._maps else None
        if found is None:
            return record
        files[found] = True
        return record + _map_record(path.with_name(found), self._folder)

    def _note(self, path: Path, beside: list[Skipped], others: OtherFiles) -> None:
        file = path.relative_to(self._folder).as_posix()
        if not path.exists():
            beside.append(Skipped(file, LINK_TO_NOWHERE, beside=True))
        elif path.suffix.lower() in captions.CAPTION_SUFFIXES and not is_double(path.name):
            beside.append(Skipped(file, "a caption without a picture of its name", beside=True))
        elif path.suffix.lower() != ".tar":  # those are named where the source is chosen
            others.add(path.name)

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every image's path, captions and size (contents are not read)."""
        return identity_of("folder", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield images with captions; those without are skipped."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        for file, size, found, *rest in unit.records:
            if not is_utf8(file):
                yield Skipped(shown(file), "its name is not UTF-8")
            elif isinstance(found, str):
                yield Skipped(file, found)
            else:
                place, parts = Place(file, 0, size), len(Place._fields)
                saliency = Place(*rest[:parts]) if len(rest) >= parts else None
                split = rest[-1] if len(rest) in (1, parts + 1) else held_out(file)
                yield Item(key=key_of(file), split=split, captions=found, image=place, name=file, saliency=saliency)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._files, self._folder, item.image, limit)


def _map_record(path: Path, folder: Path) -> list[Any]:
    """Return the place of a saliency map below `folder`; nothing where it cannot be read."""
    size = file_size(path)
    return [path.relative_to(folder).as_posix(), 0, size] if isinstance(size, int) else []


def _alone(path: Path, folder: Path) -> Skipped:
    name = path.relative_to(folder).as_posix()
    return Skipped(name, "a saliency map without a picture of its name", beside=True)


def has_captioned_image(folder: Path) -> bool:
    """Return whether an image with a caption beside it is in `folder`, at any depth."""
    for found in walk_folders(folder):
        if not isinstance(found, Skipped):
            names = dict.fromkeys(found[1])
            if any(
                is_image(name) and other_image(name) is None and captions.caption_file(name, names) for name in names
            ):
                return True
    return False


class ClassFolderSource:
    """Images whose class is their folder: FOLDER/CLASS/NAME, or FOLDER/train/CLASS/NAME with FOLDER/val/CLASS/NAME.

    Labels count the classes in the order of their names, as torchvision and every published trainer do. Captions are
    the first name of the class in LOC_synset_mapping.txt, where the folder holds that file, else the folder's name.
    Without `val` (or `validation`, `valid`), one image in twenty, by hash of its path, is held out.
    CLASS/NAME.saliency.png is the saliency map of NAME, and no image.
    """

    def __init__(
        self,
        folder: Path,
        moments: Path | None = None,
        flip: bool = False,
        files: Files = LOCAL,
        maps: bool = False,
    ) -> None:
        """`moments`: folder of ProMoE's cached CLASS/NAME.latent.npz files; `flip`: add training images mirrored.

        `maps`: take saliency maps.
        """
        for path, what in ((folder, "--source"), (moments, "--moments")):
            if path is not None and not path.is_dir():
                raise DataError(f"{path}: no such folder; {what} takes a folder of class folders")
        self._folder, self._moments, self._flip, self._files = folder, moments, flip, files
        self._maps = maps

    def units(self) -> Iterator[Unit]:
        """Yield images class by class, with their sizes."""
        beside: list[Skipped] = []
        empty = True
        for unit in units_of(self._records(beside)):
            empty = False
            yield unit
        if empty:
            seen = f" ({beside[0].name}: {beside[0].reason})" if beside else ""
            raise DataError(f"{self._folder}: no image found{seen}; expected CLASS/NAME.jpg, one folder per class")
        yield from unit_beside(beside)

    def _records(self, beside: list[Skipped]) -> Iterator[Any]:
        """Yield [folder of the class folders, file below it, split or "", caption, label, bytes].

        The bytes are a text where the file cannot be read. Adds to `beside` what no class folder holds.
        """
        others, unused = OtherFiles("only pictures in class folders are"), 0
        roots = self._roots()
        train = roots[0][0]
        apart = {root for root, _ in roots}
        classes = [path.name for path in _class_folders(train, apart, beside, self._folder)]
        names = _class_names(self._folder)
        for root, split in roots:
            within = root.relative_to(self._folder).as_posix()
            for label, name in enumerate(classes):
                listed = self._listed(root / name, beside)
                maps = {str(path) for path in listed if is_saliency_map(path.name)}
                unused, used = unused + (0 if self._maps else len(maps)), set[str | None]()
                for path in [path for path in listed if str(path) not in maps] if maps else listed:
                    file, other = path.relative_to(root).as_posix(), other_image(path.name)
                    if other is not None:
                        beside.append(Skipped((Path(within) / file).as_posix(), other, beside=True))
                    elif is_image(path.name):
                        found = saliency_map_of(str(path), maps.__contains__) if self._maps else None
                        used.add(found)
                        of_map = [] if found is None else _map_record(Path(found), self._folder)
                        yield [within, file, split, names.get(name, name), label, file_size(path), *of_map]
                    else:
                        others.add(path.name)
                beside += [_alone(Path(path), self._folder) for path in sorted(maps) if self._maps and path not in used]
        beside += self._without_class(roots, classes, others)
        beside += [*others.left_out(), *unused_maps(unused)]

    def _roots(self) -> list[tuple[Path, str]]:
        """Return folders of class folders with their split; "" where the split is drawn."""
        train = self._folder / "train"
        train = train if _is_split(train) else self._folder
        for val in (self._folder / name for name in _HELD_OUT_FOLDERS):
            # Without train/, a folder called val that holds no class of the others is itself a class.
            if val.is_dir() and (train != self._folder or _shares_class(val, train)):
                return [(train, "train"), (val, "unseen")]
        return [(train, "")]

    def _listed(self, folder: Path, beside: list[Skipped]) -> list[Path]:
        """Return all files of one class folder, sorted by path."""
        found: list[Path] = []
        for entry in walk_folders(folder) if folder.is_dir() else ():
            if isinstance(entry, Skipped):
                beside.append(entry._replace(name=(folder.relative_to(self._folder) / entry.name).as_posix()))
            else:
                found += [entry[0] / name for name in entry[1]]
        return sorted(found)

    def _without_class(
        self, roots: list[tuple[Path, str]], classes: list[str], others: OtherFiles
    ) -> Iterator[Skipped]:
        """Yield the images that no class folder of the training images holds."""
        known = {root: set(classes) for root, _ in roots}
        known.setdefault(self._folder, set()).update(root.name for root, _ in roots)
        for top, taken in known.items():
            for path in sorted(top.iterdir()):
                file = path.relative_to(self._folder).as_posix()
                if path.is_dir():
                    if path.name not in taken and top != roots[0][0]:
                        yield from self._stray_images(path, roots[0][0])
                elif not path.exists():
                    if top != roots[0][0]:  # those of the training images are named already
                        yield Skipped(file, LINK_TO_NOWHERE, beside=True)
                elif is_image(path.name):
                    yield Skipped(file, f"not in a class folder; expected {top.name}/CLASS/{path.name}", beside=True)
                elif path.name != _NAMES_FILE:
                    others.add(path.name)

    def _stray_images(self, folder: Path, train: Path) -> Iterator[Skipped]:
        expected = f"{folder.name}/ is not a class of {train.name}/"
        if folder.parent == self._folder:
            expected = f"{folder.name}/ is neither train/ nor {' nor '.join(f'{name}/' for name in _HELD_OUT_FOLDERS)}"
        beside: list[Skipped] = []
        for path in self._listed(folder, beside):
            if is_image(path.name):
                yield Skipped(path.relative_to(self._folder).as_posix(), expected, beside=True)
        yield from beside

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every image's path, label and size (contents are not read)."""
        settings = {"moments": self._moments is not None, "flip": self._flip}
        return identity_of("classes", self._folder, units, **settings)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield every image, and its mirror image for training; images whose latent is not cached are skipped."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        for within, file, split, caption, label, size, *maps in unit.records:
            path = Path(within, file).as_posix()
            latent = None if self._moments is None else self._latent(self._moments, within, file)
            wrong = self._wrong(path, size, latent)
            if wrong is not None:
                yield Skipped(shown(path), wrong)
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
                saliency=Place(*maps) if maps else None,
            )
            yield item
            if self._flip and split == "train":
                yield replace(item, key=f"{item.key}-flip", flip=True)

    def _latent(self, moments: Path, within: str, file: str) -> Path | str:
        """Return the file of a cached latent, or why there is none.

        Where the moments are not in folders of splits, as those of ProMoE, they are of the training images: an image of
        another split takes its own only where no training image has the same class and name.
        """
        in_splits = within != "." and (moments / within).is_dir()
        latent = (moments / within if in_splits else moments) / Path(file).with_suffix(".latent.npz")
        if not in_splits and within not in (".", "train") and (self._folder / "train" / file).exists():
            return f"no cached latent in {within}/, and the one of this name is that of train/{file}"
        return latent if latent.is_file() else "no cached latent"

    def _wrong(self, path: str, size: int | str, latent: Path | str | None) -> str | None:
        """Return why an image cannot be used, None where it can."""
        if not is_utf8(path):
            return "its name is not UTF-8"
        if isinstance(size, str):
            return size
        return latent if isinstance(latent, str) else None

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._files, self._folder, item.image, limit)


def _class_folders(train: Path, apart: Iterable[Path], beside: list[Skipped], folder: Path) -> list[Path]:
    """Return the class folders in the order of their names; add to `beside` those that are not."""
    found = []
    for path in sorted(train.iterdir(), key=lambda path: path.name):
        if path.is_symlink() and not path.exists():
            name = path.relative_to(folder).as_posix()
            beside.append(Skipped(name, LINK_TO_NOWHERE, beside=True))
        elif path.is_dir() and path not in apart:
            reason = _no_class(path, train)
            if reason is None:
                found.append(path)
            else:
                beside.append(Skipped(path.relative_to(folder).as_posix(), reason, beside=True))
    return found


def _no_class(path: Path, train: Path) -> str | None:
    if path.name.startswith("."):
        return "a hidden folder is no class; rename it where it is one"
    if path.name == "__MACOSX":
        return "what macOS adds to archives is no class"
    return "a link to a folder that holds it" if train.resolve().is_relative_to(path.resolve()) else None


def _is_split(train: Path) -> bool:
    """Return whether a folder called train holds class folders, and is not itself the class of pictures of trains."""
    if not train.is_dir():
        return False
    siblings = {path.name for path in train.parent.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return siblings <= SPLIT_FOLDERS.keys() or any(path.is_dir() for path in train.iterdir())


def _shares_class(val: Path, train: Path) -> bool:
    return any(path.is_dir() and (train / path.name).is_dir() for path in val.iterdir())


def _class_names(folder: Path) -> dict[str, str]:
    """Read the first name of every class from LOC_synset_mapping.txt; empty where the file does not exist."""
    path = folder / _NAMES_FILE
    lines = (line.partition(" ") for line in text_lines(path) if line.strip()) if path.is_file() else ()
    return {key: names.split(",")[0].strip() for key, _, names in lines}
