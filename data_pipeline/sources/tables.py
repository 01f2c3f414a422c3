"""Tables of captions as a source: .jsonl, .csv, .tsv or .parquet, read row by row."""

import csv
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from data_pipeline.identity import Identity
from data_pipeline.sources import embedded
from data_pipeline.sources.captions import FIELDS, from_object
from data_pipeline.sources.items import (
    Captions,
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
    survey_beside,
    unit_beside,
    units_of,
)
from data_pipeline.sources.walk import OtherFiles, file_size, is_image, walk_folders
from sharpmoe.errors import DataError

_FILE_FIELDS = ("file", "image", "path", "filename", "file_name")
_FORM = 'expected {"file": "a.png", "caption": "..."} with an optional integer "label"'
_COLUMNS = f"expected a column {' or '.join(_FILE_FIELDS)} and a column {' or '.join(FIELDS)}"
_NAMED = 1_000_000  # rows of tables up to which the rest of their folder is compared with them
_FIELD_BYTES = 1 << 20  # of one cell


class Table(NamedTuple):
    """One table of a source."""

    path: Path
    split: str = ""  # "": drawn for every image


class TableSource:
    """Images that tables of captions name: .jsonl, .csv, .tsv or .parquet; paths relative to the table's folder.

    Columns: file (or image, path, filename), caption (or text, prompt, captions), label (optional, an integer). An
    image may be in several rows: each is a sample of its own. Several captions of one sample are a list. A .parquet
    may hold the images themselves, as Hugging Face writes them: a column of {"bytes", "path"}.
    """

    def __init__(self, folder: Path, tables: Sequence[Table], whole_folder: bool = False) -> None:
        """`tables`: files below `folder`; `whole_folder`: name what else `folder` holds as left out."""
        self._folder, self._tables, self._whole_folder = folder, tables, whole_folder
        self._pictures = embedded.EmbeddedImages(folder)

    def units(self) -> Iterator[Unit]:
        """Yield the rows of the tables."""
        first, named = "", set[int]()
        empty = True
        for unit in units_of(self._records()):
            for record in unit.records:
                if self._whole_folder and len(named) < _NAMED:
                    named.add(hash(os.path.normpath(record[1])))
                if isinstance(record[2], str):
                    first = first or f"{record[1]}: {record[2]}"
                else:
                    empty = False
            yield unit
        if empty:
            seen = f" ({shown(first)})" if first else ""
            raise DataError(f"{self._shown()}: no captioned image found{seen}; expected a row for every image: {_FORM}")
        if self._whole_folder and len(named) < _NAMED:
            yield from unit_beside(self._beside(named))

    def _beside(self, named: set[int]) -> Iterator[Skipped]:
        """Yield what the folder holds beside the tables and the images that they name (hashes of their paths)."""
        others = OtherFiles("only the table and its pictures are")
        tables = {table.path for table in self._tables}
        count, first = 0, ""
        for found in walk_folders(self._folder):
            if isinstance(found, Skipped):
                yield found
                continue
            for path in (found[0] / name for name in found[1]):
                file = path.relative_to(self._folder).as_posix()
                if not is_image(path.name):
                    if path not in tables:
                        others.add(path.name)
                elif hash(file) not in named:
                    count, first = count + 1, first or file
        if count:
            more = f" and {count - 1} more" if count > 1 else ""
            yield Skipped(f"{first}{more}", f"not named in {self._names()}", beside=True)
        yield from others.left_out()

    def _names(self) -> str:
        return ", ".join(table.path.name for table in self._tables[:3]) + (", ..." if len(self._tables) > 3 else "")

    def _shown(self) -> str:
        return str(self._tables[0].path if len(self._tables) == 1 else self._folder)

    def _records(self) -> Iterator[Any]:
        """Yield [row, file, captions or why there are none, label], with place and split where they are known."""
        for table in self._tables:
            within = table.path.parent.relative_to(self._folder)
            for row in _rows(table.path):
                file = (within / row.file).as_posix() if within.parts else row.file
                extra = [table.path.relative_to(self._folder).as_posix(), row.size, table.split]
                known = row.size >= 0 or table.split
                yield [row.number, file, row.captions, row.label, *(extra if known else ())]

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every row."""
        return identity_of("table", self._folder, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield the rows whose image exists."""
        if unit.beside:
            yield from survey_beside(unit)
            return
        for number, file, found, label, *extra in unit.records:
            table, size, split = extra or (self._tables[0].path.name, -1, "")
            where = f"row {number} of {Path(table).name}"
            if isinstance(found, str):
                named = not file.endswith(_line(Path(table), number))
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
                yield Item(key=key_of(file), split=split, captions=texts, image=place, name=file, label=label)

    def _place(self, file: str) -> Place | str:
        size = file_size(self._folder / file)
        return size if isinstance(size, str) else Place(file, 0, size)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        if item.image.offset:  # the number of a row: the image is in the table
            return self._pictures.read(item.image, limit)
        return read_place(self._folder, item.image, limit)


class _Row(NamedTuple):
    """One row of a table."""

    number: int  # of the line, or of the row in a .parquet, from 1
    file: str
    captions: Captions | str  # a text says why the row cannot be used
    label: int
    size: int = -1  # bytes of an image that the table holds itself


def _rows(table: Path) -> Iterator[_Row]:
    """Yield the rows of a table. Raises DataError where the table itself cannot be read."""
    for number, fields in TABLE_KINDS[table.suffix.lower()](table):
        yield _row(table, number, fields)


def _row(table: Path, number: int, fields: Any) -> _Row:
    """Parse a row; `fields` is a text where the row could not even be read."""
    tree = fields if isinstance(fields, dict) else {}
    file: Any = next((tree[name] for name in _FILE_FIELDS if tree.get(name) is not None), None)
    size: int = -1
    if isinstance(file, embedded.EmbeddedImage):
        name = f"{table.name}/{number}" + (f"/{file.path}" if file.path else "")
        file, size = name, file.size
    if not isinstance(file, str) or "\0" in file or not is_utf8(file):
        return _Row(number, _line(table, number), fields if isinstance(fields, str) else _shown_row(fields), -1)
    label = _label(tree.get("label"))
    found = from_object(tree) if isinstance(label, int) else label
    return _Row(number, file, found, label if isinstance(label, int) else -1, size)


def _line(table: Path, number: int) -> str:
    """Return the name of a row that names no file."""
    return f"{table.name}, line {number}"


def _shown_row(fields: Any) -> str:
    return f"{json.dumps(fields, default=str)[:80]}; {_FORM}"


def _label(value: Any) -> int | str:
    """Return a label, -1 where there is none, or what is wrong with it; 3.0 and "3.0" are 3, as pandas writes them."""
    text = str("" if value is None else value).strip()
    if text.lower() in ("", "nan", "none", "null"):
        return -1
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not number.is_integer() or abs(number) >= 2**31:
        return f"label {text[:40]!r} is not a whole number"
    return max(-1, int(number))


def _jsonl(table: Path) -> Iterator[tuple[int, Any]]:
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(table, line)
            if line.strip():
                yield number, _parsed(number, line)


def _parsed(number: int, line: bytes) -> Any:
    """Return the object of a line, or what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start}); save it as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', None) or 'nested too deeply'}); {_FORM}"


class _Lines:
    """The lines of a file, which can be given again from the second line of a record on."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._again = iter(file), deque[str]()
        self.record: list[str] = []  # lines since the record began
        self.number = 0  # of the last line

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.record.append(line)
        self.number += 1
        return line

    def retry(self) -> int:
        """Give up the first line of the record, and give the others again. Return the number of that first line."""
        again = self.record[1:]
        self._again.extendleft(reversed(again))
        self.number -= len(again)
        return self.number


def _csv(table: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a .csv or .tsv.

    A quote that is never closed would swallow the rest of the table: such a row is given up, and reading goes on at
    the line that follows its first one.
    """
    csv.field_size_limit(_FIELD_BYTES)
    with table.open("rb") as start:
        _refuse_utf16(table, start.read(4))
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            lines.record = []
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{table}, line {lines.number}: {error}; {_COLUMNS}") from None
                number = lines.retry()
                yield number, f"{error}; is a quote not closed?"
                continue
            if header is None and cells:
                header = [name if name in _KNOWN else name.strip().lower() for name in cells]
                _need_columns(table, header)
            elif header is not None and cells:
                yield lines.number, _fitted(cells, header, delimiter)
        _need_columns(table, header or [])


def _fitted(cells: list[str], header: list[str], delimiter: str) -> Any:
    """Return the cells by column, or why they do not fit."""
    if any(not is_utf8(cell) for cell in cells):
        return "not UTF-8 text; save the table as UTF-8"
    if any(cells[len(header) :]):
        kind = "tab" if delimiter == "\t" else "comma"
        return f"{len(cells)} cells, the header has {len(header)}: put a caption that holds a {kind} in quotes"
    return _typed(dict(zip(header, cells, strict=False)))


def _typed(cells: dict[str, Any]) -> dict[str, Any]:
    """Convert cells to what JSON would hold: a list for several captions, nothing for an empty cell."""
    several = cells.get("captions")
    if several and several.lstrip().startswith("["):
        try:
            cells["captions"] = json.loads(several)
        except json.JSONDecodeError:
            return cells  # a caption may begin with a bracket
    return cells


def _parquet(table: Path) -> Iterator[tuple[int, Any]]:
    with embedded.opened(table, f"{_COLUMNS}") as file:
        names = file.schema_arrow.names
        columns = embedded.image_columns(file)
        class_names = embedded.class_names(file, "label")
        _need_columns(table, [*names, *(["file"] if columns else []), *(["caption"] if class_names else [])])
        wanted = [name for name in (*_FILE_FIELDS, *FIELDS, "label") if name in names and name not in columns]
        number = 0
        for batch in file.iter_batches(batch_size=512 if columns else 4096, columns=[*wanted, *columns[:1]]):
            images = embedded.images_of(batch, columns[0]) if columns else None
            for place, fields in enumerate(batch.select(wanted).to_pylist() if wanted else [{}] * len(batch)):
                number += 1
                yield number, _with_image(fields, images[place] if images else None, class_names)


def _with_image(fields: dict[str, Any], image: Any, class_names: list[str]) -> dict[str, Any]:
    """Add the image that the row holds itself, and the name of its class where the table has no captions."""
    if image is not None:
        fields = {**fields, "file": image.path if image.size < 0 else image}
    label = fields.get("label")
    if class_names and not any(name in fields for name in FIELDS) and isinstance(label, int):
        fields["caption"] = class_names[label] if 0 <= label < len(class_names) else None
    return fields


def _need_columns(table: Path, names: list[str]) -> None:
    if not any(name in names for name in _FILE_FIELDS) or not any(name in names for name in FIELDS):
        listed = ", ".join(shown(name) for name in names) or "none"
        raise DataError(f"{table}: columns {listed}; {_COLUMNS}")


def _refuse_utf16(table: Path, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start[:4]:
        raise DataError(f"{table}: not UTF-8 text (UTF-16?); save it as UTF-8")


_KNOWN = frozenset({*_FILE_FIELDS, *FIELDS, "label"})
TABLE_KINDS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
