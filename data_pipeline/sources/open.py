"""The source that `--source` names: a table of recognisers, tried in order.

To add a source, write a class with the methods of `sources.items.ImageSource` and add a row to SOURCES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sources.fluent import FluentSource
from data_pipeline.sources.folders import ClassFolderSource, SidecarSource
from data_pipeline.sources.items import ImageSource
from data_pipeline.sources.tables import TABLE_SUFFIXES, TableSource
from data_pipeline.sources.tars import TarSource
from sharpmoe.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The command-line options of launcher/prepare.py that choose a source."""

    source: str  # `fluent`, or a path
    class_folders: bool = False  # the folder holds one folder per class
    moments: Path | None = None  # ProMoE's cached latents of a folder of classes
    flip: bool = False  # class folders: add training images mirrored
    cache: Path = Path("data/downloads")  # of the default images
    tarball: Path | None = None  # the npm package of the default images


Recogniser = Callable[[SourceOptions, Path], ImageSource | None]  # None: the options do not name this source


def _fluent(options: SourceOptions, path: Path) -> ImageSource | None:
    return FluentSource(options.cache, options.tarball) if options.source == "fluent" else None


def _class_folders(options: SourceOptions, path: Path) -> ImageSource | None:
    chosen = options.class_folders or options.moments
    return ClassFolderSource(path, options.moments, options.flip) if chosen else None


def _table(options: SourceOptions, path: Path) -> ImageSource | None:
    return TableSource(path) if path.suffix in TABLE_SUFFIXES and path.is_file() else None


def _tar(options: SourceOptions, path: Path) -> ImageSource | None:
    return TarSource(path.parent, [path]) if path.suffix == ".tar" and path.is_file() else None


def _folder_with_table(options: SourceOptions, path: Path) -> ImageSource | None:
    tables = sorted(entry for entry in path.glob("captions.*") if entry.suffix in TABLE_SUFFIXES)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{path}: holds {names}; name one of them with --source")
    return TableSource(tables[0]) if tables else None


def _folder_with_tars(options: SourceOptions, path: Path) -> ImageSource | None:
    tars = sorted(path.rglob("*.tar"))
    return TarSource(path, tars) if tars else None


def _folder(options: SourceOptions, path: Path) -> ImageSource | None:
    return SidecarSource(path) if path.is_dir() else None


SOURCES: tuple[Recogniser, ...] = (
    _fluent,
    _class_folders,
    _table,
    _tar,
    _folder_with_table,
    _folder_with_tars,
    _folder,
)


def open_source(options: SourceOptions) -> ImageSource:
    """Return the first source that recognises the options. Raises DataError where there is none."""
    path = Path(options.source)
    for recognise in SOURCES:
        found = recognise(options, path)
        if found is not None:
            return found
    raise DataError(
        f"{path}: no such folder; --source takes `fluent`, a folder of images with captions, a table of captions "
        f"({' '.join(sorted(TABLE_SUFFIXES))}) or a .tar"
    )
