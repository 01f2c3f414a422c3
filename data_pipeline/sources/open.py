"""The source that `--source` names: a table of recognisers, tried in order.

To add a source, write a class with the methods of `sources.items.ImageSource` and add a row to SOURCES.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.sources.files import LOCAL, Files
from data_pipeline.sources.fluent import FluentSource
from data_pipeline.sources.folders import ClassFolderSource, SidecarSource, has_captioned_image
from data_pipeline.sources.hub import find_tables, snapshot_of
from data_pipeline.sources.idx import find_idx_source
from data_pipeline.sources.items import IMAGE_SUFFIXES, SPLIT_FOLDERS, ImageSource, Skipped
from data_pipeline.sources.remote import open_remote
from data_pipeline.sources.rows import TABLE_KINDS
from data_pipeline.sources.tables import Table, TableSource
from data_pipeline.sources.tars import TarSource
from data_pipeline.sources.walk import is_double, is_image, walk_folders
from sharpmoe.errors import DataError

_TAKEN = (
    "--source takes `fluent`, a folder of images with captions, a table of captions "
    f"({' '.join(sorted(TABLE_KINDS))}) or a .tar; or one of these at s3:// or gs://, or a .tar at http(s)://"
)
_NOT_TAKEN: dict[str | tuple[str, ...], str] = {
    ".json": ": save it as .jsonl, one object a line",
    (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"): ": expand it to a plain .tar or to a folder",
    (".zip", ".7z", ".rar"): ": expand it to a folder",
    (".xlsx", ".xls", ".ods"): ": save it as .csv in UTF-8",
    (".txt", ".md"): ": name the folder that holds it and the pictures",
    tuple(IMAGE_SUFFIXES): ": name the folder that holds it and its caption",
}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The command-line options of launcher/prepare.py that choose a source."""

    source: str  # `fluent`, or a path
    class_folders: bool = False  # the folder holds one folder per class
    moments: Path | None = None  # ProMoE's cached latents of a folder of classes
    flip: bool = False  # class folders: add training images mirrored
    cache: Path = Path("data/downloads")  # of the default images
    tarball: Path | None = None  # the npm package of the default images
    saliency_maps: bool = False  # take the maps that lie beside the images, or that a table names
    files: Files = LOCAL  # how the files of the source are read


_TABLE_STEMS = ("captions", "metadata")  # names of tables that are found by themselves; the second is Hugging Face's

Recogniser = Callable[[SourceOptions, Path], ImageSource | None]  # None: the options do not name this source


def _fluent(options: SourceOptions, path: Path) -> ImageSource | None:
    return FluentSource(options.cache, options.tarball) if options.source == "fluent" else None


def _class_folders(options: SourceOptions, path: Path) -> ImageSource | None:
    chosen = options.class_folders or options.moments
    return (
        ClassFolderSource(path, options.moments, options.flip, maps=options.saliency_maps, files=options.files)
        if chosen
        else None
    )


def _table(options: SourceOptions, path: Path) -> ImageSource | None:
    return (
        TableSource(path.parent, [Table(path)], maps=options.saliency_maps, files=options.files)
        if _is_table(path)
        else None
    )


def _tar(options: SourceOptions, path: Path) -> ImageSource | None:
    return (
        TarSource(path.parent, [path], files=options.files, maps=options.saliency_maps)
        if path.suffix.lower() == ".tar" and path.is_file()
        else None
    )


def _folder_with_table(options: SourceOptions, path: Path) -> ImageSource | None:
    """Recognise captions.* and metadata.* in the folder, the first of them before the other, or in its splits."""
    for stem in _TABLE_STEMS:
        tables = _tables_in(path, stem)
        _refuse_several(path, tables, "name one of them with --source")
        if tables:
            return TableSource(
                path, [Table(tables[0])], whole_folder=True, maps=options.saliency_maps, files=options.files
            )
    found = [Table(table, split) for name, split in SPLIT_FOLDERS.items() for table in _table_of_split(path / name)]
    if not any(table.split == "unseen" for table in found):  # captions.* of train/ alone do not say what is held out
        found = [table for table in found if table.path.stem.lower() != "captions"]
    return (
        TableSource(path, found, whole_folder=True, maps=options.saliency_maps, files=options.files) if found else None
    )


def _folder_with_idx(options: SourceOptions, path: Path) -> ImageSource | None:
    return find_idx_source(path)


def _folder_with_images_in_tables(options: SourceOptions, path: Path) -> ImageSource | None:
    """Recognise a data set of Hugging Face: .parquet or .arrow files that hold the images."""
    found = find_tables(path, nested=not _tars_in(path))
    if not found or has_captioned_image(path):
        return None
    return TableSource(path, found, whole_folder=True, maps=options.saliency_maps, files=options.files)


def _folder_with_tars(options: SourceOptions, path: Path) -> ImageSource | None:
    tars = _tars_in(path)
    if not tars or has_captioned_image(path):
        return None
    return TarSource(path, tars, _stray_images(path), options.files, maps=options.saliency_maps)


def _folder(options: SourceOptions, path: Path) -> ImageSource | None:
    if not path.is_dir():
        return None
    left_out = [
        Skipped(
            tar.relative_to(path).as_posix(), "a tar beside captioned pictures, which are taken instead", beside=True
        )
        for tar in _tars_in(path)
    ]
    return SidecarSource(path, left_out, maps=options.saliency_maps, files=options.files)


SOURCES: tuple[Recogniser, ...] = (
    _fluent,
    _class_folders,
    _table,
    _tar,
    _folder_with_table,
    _folder_with_idx,
    _folder_with_images_in_tables,
    _folder_with_tars,
    _folder,
)


def open_source(options: SourceOptions) -> ImageSource:
    """Return the first source that recognises the options. Raises DataError where there is none."""
    if "://" in options.source:
        place = open_remote(options.source)
        return place.wrap(open_source(replace(options, source=str(place.path), files=place.files)))
    path = Path(options.source)
    path = snapshot_of(path) or path
    for recognise in SOURCES:
        found = recognise(options, path)
        if found is not None:
            return found
    _refuse_file(path)
    raise DataError(f"{path}: no such {'file' if path.suffix else 'folder'}; {_TAKEN}")


def _refuse_file(path: Path) -> None:
    """Raise a DataError that says why a file is no source."""
    if path.is_file():
        how = next((how for suffixes, how in _NOT_TAKEN.items() if path.name.lower().endswith(suffixes)), "")
        kind = path.suffix.lower() or "without suffix"
        raise DataError(f"{path}: a file of this kind ({kind}) is not taken{how}; {_TAKEN}")


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_KINDS and path.is_file()


def _tables_in(folder: Path, stem: str) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.stem.lower() == stem and _is_table(path)]


def _table_of_split(folder: Path) -> list[Path]:
    """Return the one captions.* or metadata.* of a split's folder. Raises DataError where it holds several."""
    tables = [table for stem in _TABLE_STEMS for table in _tables_in(folder, stem)]
    _refuse_several(folder, tables, "keep one of them there")
    return tables


def _refuse_several(folder: Path, tables: list[Path], how: str) -> None:
    if len(tables) > 1:
        raise DataError(f"{folder}: holds {', '.join(table.name for table in tables)}; {how}")


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not is_double(name)


def _tars_in(folder: Path) -> list[Path]:
    found = [entry for entry in walk_folders(folder) if not isinstance(entry, Skipped)] if folder.is_dir() else []
    return sorted(path / name for path, names in found for name in names if _is_tar(name))


def _stray_images(folder: Path) -> list[Skipped]:
    """Return the images beside tars."""
    return [
        Skipped((path / name).relative_to(folder).as_posix(), "a picture without caption, beside tars", beside=True)
        for entry in walk_folders(folder)
        if not isinstance(entry, Skipped)
        for path, names in [entry]
        for name in names
        if is_image(name)
    ]
