"""A table of captions as a source: .jsonl, .csv, .tsv or .parquet, read row by row."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.identity import Identity
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
    units_of,
)
from sharpmoe.errors import DataError

TABLE_SUFFIXES = frozenset({".jsonl", ".csv", ".tsv", ".parquet"})
_FILE_FIELDS = ("file", "image", "path", "filename", "file_name")
_FORM = 'expected {"file": "a.png", "caption": "..."} with an optional integer "label"'
_COLUMNS = f"expected a column {' or '.join(_FILE_FIELDS)} and a column {' or '.join(FIELDS)}"
_FIELD_BYTES = 1 << 20  # of one cell


class TableSource:
    """Images that a table of captions names: .jsonl, .csv, .tsv or .parquet; paths relative to the table's folder.

    Columns: file (or image, path, filename), caption (or text, prompt, captions), label (optional, an integer). An
    image may be in several rows: each is a sample of its own. Several captions of one sample are a list.
    """

    def __init__(self, table: Path) -> None:
        self._table = table

    def units(self) -> Iterator[Unit]:
        """Yield the rows of the table."""
        empty = True
        for unit in units_of([row.number, row.file, row.captions, row.label] for row in _rows(self._table)):
            empty = False
            yield unit
        if empty:
            raise DataError(f"{self._table}: no captioned image found; expected a row for every image")

    def identity(self, units: list[str]) -> Identity:
        """Return a hash over every row."""
        return identity_of("table", self._table.parent, units)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        """Yield the rows whose image exists."""
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
                yield Item(key=key_of(file), split=held_out(file), captions=texts, image=place, name=file, label=label)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return read_place(self._table.parent, item.image, limit)


class _Row(NamedTuple):
    """One row of a table."""

    number: int  # of the line, or of the row in a .parquet, from 1
    file: str
    captions: Captions
    label: int


def _rows(table: Path) -> Iterator[_Row]:
    """Yield the rows of a table. Raises DataError that names the first line that cannot be used."""
    kinds = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    for number, fields in kinds[table.suffix](table):
        yield _row(table, number, fields)


def _row(table: Path, number: int, fields: Any) -> _Row:
    tree = fields if isinstance(fields, dict) else {}
    file = next((tree[name] for name in _FILE_FIELDS if tree.get(name) is not None), None)
    found, label = from_object(tree), tree.get("label")
    label = -1 if label is None else label
    plain = isinstance(file, str) and "\0" not in file and is_utf8(file)
    if not isinstance(file, str) or not plain or found is None or not isinstance(label, int):
        shown = json.dumps(fields, ensure_ascii=False, default=str)[:80]
        raise DataError(f"{table}, line {number}: {shown}; {_FORM}")
    return _Row(number, file, found, label)


def _jsonl(table: Path) -> Iterator[tuple[int, Any]]:
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(table, number, line)


def _parsed(table: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{table}, line {number}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        message = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{table}, line {number}: not JSON ({message}); {_FORM}") from None


def _csv(table: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_FIELD_BYTES)
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
        try:
            _need_columns(table, reader.fieldnames or [])
            for cells in reader:
                yield reader.line_num, _typed(cells)
        except UnicodeDecodeError as error:
            raise DataError(f"{table}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{table}, line {reader.line_num}: {error}; {_COLUMNS}") from None


def _typed(cells: dict[str, Any]) -> dict[str, Any]:
    """Convert cells to what JSON would hold: a whole number for the label, a list for several captions."""
    label = (cells.get("label") or "").strip()
    if label.lstrip("-").isdigit():
        cells["label"] = int(label)
    elif not label:
        cells.pop("label", None)
    several = cells.get("captions")
    if several and several.lstrip().startswith("["):
        try:
            cells["captions"] = json.loads(several)
        except json.JSONDecodeError:
            return cells  # a caption may begin with a bracket
    return cells


def _parquet(table: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415  (optional)
    except ImportError:
        raise DataError(
            f"{table}: reading .parquet needs pyarrow; pip install pyarrow, or save the table as .jsonl or .csv"
        ) from None
    try:
        with parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            _need_columns(table, names)
            wanted = [name for name in (*_FILE_FIELDS, *FIELDS, "label") if name in names]
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=wanted):
                for number, fields in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020  (it goes on)
                    yield number, fields
    except (ArrowException, OSError) as error:
        raise DataError(f"{table}: not a parquet table ({str(error).splitlines()[0]}); {_COLUMNS}") from None


def _need_columns(table: Path, names: list[str] | Any) -> None:
    if not any(name in names for name in _FILE_FIELDS) or not any(name in names for name in FIELDS):
        raise DataError(f"{table}: columns {', '.join(map(str, names))}; {_COLUMNS}")
