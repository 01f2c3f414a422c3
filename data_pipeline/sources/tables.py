"""Tables of captions as a source."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.identity import Identity
from data_pipeline.sources.embedded import MAPS, EmbeddedImages
from data_pipeline.sources.files import LOCAL, Files, read_place
from data_pipeline.sources.items import (
    Item,
    Place,
    Skipped,
    Unit,
    held_out,
    identity_of,
    key_of,
    shown,
    survey_beside,
    unit_beside,
    units_of,
)
from data_pipeline.sources.rows import ROW_FORM, Row, read_rows, row_name
from data_pipeline.sources.walk import (
    OtherFiles,
    held_out_folders,
    is_image,
    is_saliency_map,
    saliency_map_of,
    split_of_folder,
    unused_maps,
    walk_folders,
)
from sharpmoe.errors import DamageError, DataError

_DAMAGE = 0  # in place of a row's number, which counts from 1: the rest of the table cannot be read
_NAMED = 1_000_000  # rows of tables up to which the rest of their folder is compared with them


class Table(NamedTuple):
    """One table of a source."""

    path: Path
    split: str = ""  # "": drawn for every image


class TableSource:
    """Images that tables of captions name, or hold (kinds: rows.TABLE_KINDS); paths relative to the table's folder.

    Columns: file (or image, path, filename), caption (or text, prompt, captions), label (optional, an integer). An
    image may be in several rows: each is a sample of its own. Several captions of one sample are a list. A .parquet or
    .arrow may hold the images themselves, as Hugging Face writes them: a column of {"bytes", "path"}.
    Where no table is of a split and rows name images below val/, validation/, valid/ or test/ in the folder itself,
    exactly those are held out; else one in twenty is, by hash of its path.
    A column `saliency` is the path of a saliency map, or holds it as images are held; without, it is NAME.saliency.png
    beside the image.
    """

    def __init__(
        self,
        folder: Path,
        tables: Sequence[Table],
        whole_folder: bool = False,
        files: Files = LOCAL,
        maps: bool = False,
    ) -> None:
        """`tables`: files below `folder`; `whole_folder`: name what else it holds; `maps`: take saliency maps."""
        self._folder, self._tables, self._whole_folder, self._maps = folder, tables, whole_folder, maps
        self._files, self._pictures = files, EmbeddedImages(folder, files)

    def units(self) -> Iterator[Unit]:
        """Yield the rows of the tables."""
        first, named = "", set[int]()
        empty = True
        for unit in units_of(self._records()):
            for record in unit.records:
                if self._whole_folder and len(named) < _NAMED:
                    files = (file for file in (record[1], *record[7:]) if isinstance(file, str))
                    named.update(hash(os.path.normpath(file)) for file in files)
                if isinstance(record[2], str):
                    first = first or f"{record[1]}: {record[2]}"
                else:
                    empty = False
            yield unit
        if empty:
            seen = f" ({shown(first)})" if first else ""
            raise DataError(f"{self._shown()}: no captioned image found{seen}; for every image {ROW_FORM}")
        if self._whole_folder and len(named) < _NAMED:
            yield from unit_beside(self._beside(named))

    def _beside(self, named: set[int]) -> Iterator[Skipped]:
        """Yield what the folder holds beside the tables and the images that they name (hashes of their paths)."""
        others = OtherFiles("only the table and its pictures are")
        tables = {table.path for table in self._tables}
        count, first, unused = 0, "", 0
        for found in walk_folders(self._folder):
            if isinstance(found, Skipped):
                yield found
                continue
            for path in (found[0] / name for name in found[1]):
                file = path.relative_to(self._folder).as_posix()
                if not is_image(path.name):
                    if path not in tables:
                        others.add(path.name)
                elif hash(file) in named:
                    continue
                elif is_saliency_map(path.name):
                    unused += not self._maps
                else:
                    count, first = count + 1, first or file
        if count:
            more = f" and {count - 1} more" if count > 1 else ""
            yield Skipped(f"{first}{more}", f"not named in {self._names()}", beside=True)
        yield from others.left_out()
        yield from unused_maps(unused)

    def _names(self) -> str:
        return ", ".join(table.path.name for table in self._tables[:3]) + (", ..." if len(self._tables) > 3 else "")

    def _shown(self) -> str:
        return str(self._tables[0].path if len(self._tables) == 1 else self._folder)

    def _records(self) -> Iterator[Any]:
        """Yield [row, file, captions or why there are none, label], with table, bytes, split and map where known.

        The map is a file, or the bytes of one in the table.
        """
        apart = self._apart()
        for table in self._tables:
            within = table.path.parent.relative_to(self._folder)
            for row in self._rows(table):
                file = self._file(table, row)
                split = table.split or (split_of_folder(self._folder / file, apart) if apart else "")
                extra = [table.path.relative_to(self._folder).as_posix(), row.size, split]
                if self._maps and row.saliency != "":
                    found = row.saliency
                    extra.append((within / found).as_posix() if isinstance(found, str) else found)
                known = row.size >= 0 or split or len(extra) > 3
                yield [row.number, file, row.captions, row.label, *(extra if known else ())]

    def _apart(self) -> list[Path]:
        """Return the folders of held-out images, resolved, where a usable row of a table without split is below one.

        The tables are read for it where the source has such a folder, and else not.
        """
        apart = [path.resolve() for path in held_out_folders(self._folder)]
        drawn = [table for table in self._tables if not table.split] if apart else []
        named = any(
            not isinstance(row.captions, str)
            and split_of_folder(self._folder / self._file(table, row), apart) == "unseen"
            for table in drawn
            for row in self._rows(table)
        )
        return apart if named else []

    def _file(self, table: Table, row: Row) -> str:
        """Return the file that a row names, relative to the source's folder where it is relative."""
        within = table.path.parent.relative_to(self._folder)
        return (within / row.file).as_posix() if within.parts else row.file

    def _rows(self, table: Table) -> Iterator[Row]:
        """Yield the rows of a table; of a damaged one among several those before the damage, and what is wrong."""
        try:
            yield from read_rows(table.path, self._files, maps=self._maps)
        except DamageError as error:
            if len(self._tables) == 1:
                raise
            reason = f"{str(error).removeprefix(f'{table.path}: ')}; what follows is left out"
            yield Row(_DAMAGE, table.path.name, reason, -1)

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every row."""
        return identity_of("table", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield the rows whose image exists."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        for number, file, found, label, *extra in unit.records:
            table, size, split, *maps = extra or (self._tables[0].path.name, -1, "")
            if number == _DAMAGE:
                yield Skipped(shown(file), found)
                continue
            where = f"row {number} of {Path(table).name}"
            if isinstance(found, str):
                named = not file.endswith(row_name(Path(table), number))
                yield Skipped(shown(file), f"{where}: {found}" if named else found)
                continue
            place = Place(table, number, size) if size >= 0 else self._place(file)
            if not found:
                yield Skipped(file, f"{where} has no caption")
            elif isinstance(place, str):
                missing = not os.path.lexists(self._folder / file)
                reason = "it is not there" if missing else f"it is {place}"
                yield Skipped(file, f"{where} names it, but {reason}", missing=missing)
            else:
                texts = tuple((text, weight) for text, weight in found)
                split = split or held_out(file)
                if maps and isinstance(maps[0], int):
                    saliency: Place | str | None = Place(f"{table}{MAPS}", number, maps[0])
                else:
                    saliency = self._map(file, maps)
                if isinstance(saliency, str):
                    yield Skipped(file, f"its saliency map{f' {shown(maps[0])}' if maps else ''} is {saliency}")
                    continue
                yield Item(
                    key=key_of(file),
                    split=split,
                    captions=texts,
                    image=place,
                    name=file,
                    label=label,
                    saliency=saliency,
                )

    def _map(self, file: str, named: list[str]) -> Place | str | None:
        """Return the saliency map that a row names or that lies beside its image; a text says what is wrong."""
        if named:
            return self._place(named[0]) if os.path.lexists(self._folder / named[0]) else "not there"
        beside = saliency_map_of(file, self._is_there) if self._maps else None
        return None if beside is None else self._place(beside)

    def _is_there(self, file: str) -> bool:
        return (self._folder / file).is_file()

    def _place(self, file: str) -> Place | str:
        size = self._files.size(self._folder / file)
        return size if isinstance(size, str) else Place(file, 0, size)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        if item.image.offset:  # the number of a row: the image is in the table
            return self._pictures.read(item.image, limit)
        return read_place(self._files, self._folder, item.image, limit)
