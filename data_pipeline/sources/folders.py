"""Pictures in a folder of the user's own, captioned by a file beside each or by one table."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.identity import Identity
from data_pipeline.sources import captions
from data_pipeline.sources.items import (
    IMAGE_SUFFIXES,
    OTHER_PICTURES,
    Item,
    Place,
    Skipped,
    Source,
    Unit,
    chunks,
    held_out,
    identity_of,
    is_utf8,
    key_of,
    read_place,
    shown,
)
from data_pipeline.sources.tables import TABLE_SUFFIXES, rows
from data_pipeline.sources.tars import TarSource
from sharpmoe.errors import DataError


def open_source(path: Path) -> Source:
    """The source at a path: a table of captions, a tar, or a folder with captions.*, with tars, or with NAME.txt files.

    Raises DataError where there is nothing at the path.
    """
    if path.suffix in TABLE_SUFFIXES and path.is_file():
        return TableSource(path)
    if path.suffix == ".tar" and path.is_file():
        return TarSource(path.parent, [path])
    if not path.is_dir():
        raise DataError(
            f"{path}: no such folder; --source takes `fluent`, a folder of images with captions, a table of captions "
            f"({' '.join(sorted(TABLE_SUFFIXES))}) or a .tar"
        )
    tables = sorted(entry for entry in path.glob("captions.*") if entry.suffix in TABLE_SUFFIXES)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{path}: holds {names}; give the one that is meant with --source")
    if tables:
        return TableSource(tables[0])
    tars = sorted(path.rglob("*.tar"))
    return TarSource(path, tars) if tars else SidecarSource(path)


class SidecarSource:
    """Images below one folder, each captioned by NAME.txt or NAME.json beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def units(self) -> Iterator[Unit]:
        """Images in the order of their folders and names, with sizes and captions."""
        empty = True
        for unit in chunks(self._records()):
            empty = empty and all(isinstance(found, str) for _, _, found in unit.records)
            yield unit
        if empty:
            raise DataError(
                f"{self._folder}: no captioned image found; expected captions.jsonl, .csv or .parquet, or a NAME.txt "
                f"beside every NAME with one of {' '.join(sorted(IMAGE_SUFFIXES))}"
            )

    def _records(self) -> Iterator[Any]:
        """[file, bytes, captions or why there are none]."""
        for folder, folders, names in os.walk(self._folder):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                suffix, file = path.suffix.lower(), path.relative_to(self._folder).as_posix()
                if suffix in OTHER_PICTURES:
                    yield [file, 0, f"{suffix} is not read; expected {' '.join(sorted(IMAGE_SUFFIXES))}"]
                elif suffix in IMAGE_SUFFIXES and path.is_file():
                    yield [file, path.stat().st_size, captions.beside(path)]

    def identity(self, units: list[str]) -> Identity:
        """Hash over every image's path, captions and size (contents are not read)."""
        return identity_of("folder", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Images with captions; those without are skipped."""
        for file, size, found in unit.records:
            if not is_utf8(file):
                yield Skipped(shown(file), "its name is not UTF-8")
            elif isinstance(found, str):
                yield Skipped(file, found)
            else:
                yield Item(key_of(file), held_out(file), found, Place(file, 0, size), file)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        """The image's file."""
        return read_place(self._folder, item.image, limit)


class TableSource:
    """Images that a table of captions names: .jsonl, .csv, .tsv or .parquet; paths relative to the table's folder.

    Columns: file (or image, path, filename), caption (or text, prompt, captions), label (optional, an integer). An
    image may stand in several rows: each is a sample of its own. Several captions of one sample stand in a list.
    """

    def __init__(self, table: Path) -> None:
        self._table = table

    def units(self) -> Iterator[Unit]:
        """Rows of the table."""
        empty = True
        for unit in chunks([row.number, row.file, row.captions, row.label] for row in rows(self._table)):
            empty = False
            yield unit
        if empty:
            raise DataError(f"{self._table}: no captioned image found; expected a row for every image")

    def identity(self, units: list[str]) -> Identity:
        """Hash over every row."""
        return identity_of("table", self._table.parent, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Rows whose image is there."""
        for number, file, found, label in unit.records:
            path = self._table.parent / file
            if not found:
                yield Skipped(file, f"row {number} of {self._table.name} has no caption")
            elif not path.is_file():
                reason = f"row {number} of {self._table.name} names it, but it is not there"
                yield Skipped(file, reason, missing=True)
            else:
                place = Place(file, 0, path.stat().st_size)
                texts = tuple((text, weight) for text, weight in found)
                yield Item(key_of(file), held_out(file), texts, place, file, label)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        """The image's file."""
        return read_place(self._table.parent, item.image, limit)
