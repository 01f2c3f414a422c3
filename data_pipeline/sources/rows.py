"""Rows of tables that name images and captions: .jsonl, .csv, .tsv, .parquet and .arrow."""

import csv
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from data_pipeline.sources import embedded
from data_pipeline.sources.captions import FIELDS, from_object, label_of
from data_pipeline.sources.files import Files
from data_pipeline.sources.items import Captions, is_utf8, shown
from sharpmoe.errors import DataError

_FILE_FIELDS = ("file", "image", "path", "filename", "file_name")
ROW_FORM = 'expected {"file": "a.png", "caption": "..."} with an optional integer "label"'
_COLUMNS = f"expected a column {' or '.join(_FILE_FIELDS)} and a column {' or '.join(FIELDS)}"
_KNOWN = frozenset({*_FILE_FIELDS, *FIELDS, "label", embedded.SALIENCY})
_FIELD_BYTES = 1 << 20  # of one cell
_LINE_BYTES = 16 << 20  # of one line of a .jsonl


class Row(NamedTuple):
    """One row of a table."""

    number: int  # of the line, or of the row in a .parquet, from 1
    file: str  # or a name of the row, where it names no file
    captions: Captions | str  # a text says why the row cannot be used
    label: int
    size: int = -1  # bytes of an image that the table holds itself
    saliency: str | int = ""  # file of its saliency map, or the bytes of one that the table holds; "": none


def read_rows(table: Path, files: Files, *, maps: bool = False) -> Iterator[Row]:
    """Yield the rows of a table; `maps`: with saliency maps that it holds itself.

    Raises DataError where the table itself cannot be read.
    """
    for number, fields in TABLE_KINDS[table.suffix.lower()](table, files, maps):
        yield _row(table, number, fields)


def row_name(table: Path, number: int) -> str:
    """Return the name of a row that names no file."""
    return f"{table.name}, line {number}"


def _row(table: Path, number: int, fields: Any) -> Row:
    """Parse a row; `fields` is a text where the row could not even be read."""
    tree = fields if isinstance(fields, dict) else {}
    file: Any = next((tree[name] for name in _FILE_FIELDS if tree.get(name) is not None), None)
    size: int = -1
    if isinstance(file, embedded.EmbeddedImage):
        name = f"{table.name}/{number}" + (f"/{file.path}" if file.path else "")
        file, size = name, file.size
    if isinstance(file, str) and not file.strip():
        return Row(number, row_name(table, number), "it names no file", -1)
    if not isinstance(file, str) or "\0" in file or not is_utf8(file):
        return Row(number, row_name(table, number), fields if isinstance(fields, str) else _shown_row(fields), -1)
    label = label_of(tree.get("label"))
    found = from_object(tree) if isinstance(label, int) else label
    known = label if isinstance(label, int) else -1
    return Row(number=number, file=file, captions=found, label=known, size=size, saliency=_saliency(tree))


def _saliency(tree: dict[str, Any]) -> str | int:
    """Return the file of a row's saliency map, or the bytes of one in the table; "" where there is none."""
    found = tree.get(embedded.SALIENCY)
    if isinstance(found, embedded.EmbeddedImage):
        if found.size >= 0:
            return found.size
        found = found.path
    return found if isinstance(found, str) and "\0" not in found and is_utf8(found) else ""


def _shown_row(fields: Any) -> str:
    return f"{json.dumps(fields, default=str)[:80]}; {ROW_FORM}"


# --- .jsonl -----------------------------------------------------------------------------------------------------------


def _jsonl(table: Path, files: Files, maps: bool) -> Iterator[tuple[int, Any]]:
    with files.open(table) as file:
        for number, line in enumerate(_lines_of(file), start=1):
            if number == 1:
                _refuse_utf16(table, line)
            if len(line) > _LINE_BYTES:
                yield number, f"longer than {_LINE_BYTES} bytes; {ROW_FORM}"
            elif line.strip():
                yield number, _parsed(number, line)


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of one that is too long its start, which tells that it is."""
    while line := file.readline(_LINE_BYTES + 1):
        yield line
        while len(line) > _LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(_LINE_BYTES + 1) or b"\n"


def _parsed(number: int, line: bytes) -> Any:
    """Return the object of a line, or what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte {error.start}); save it as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', None) or 'nested too deeply'}); {ROW_FORM}"
    return fields if isinstance(fields, dict) else _shown_row(fields)


# --- .csv and .tsv ----------------------------------------------------------------------------------------------------


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


def _csv(table: Path, files: Files, maps: bool) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a .csv or .tsv.

    A quote that is never closed would swallow the rest of the table: such a row is given up, and reading goes on at
    the line that follows its first one.
    """
    csv.field_size_limit(_FIELD_BYTES)
    with files.open(table) as start:
        head = start.read(_FIELD_BYTES)
    _refuse_utf16(table, head)
    delimiter = _delimiter(table, head)
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
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


def _delimiter(table: Path, start: bytes) -> str:
    """Return what separates the cells: Excel writes semicolons where the comma is the decimal mark."""
    if table.suffix.lower() == ".tsv":
        return "\t"
    header = start.strip().partition(b"\n")[0]
    return ";" if b";" in header and b"," not in header else ","


def _fitted(cells: list[str], header: list[str], delimiter: str) -> Any:
    """Return the cells by column, or why they do not fit."""
    if any(not is_utf8(cell) for cell in cells):
        return "not UTF-8 text; save the table as UTF-8"
    if any(cells[len(header) :]):
        kind = {"\t": "tab", ";": "semicolon"}.get(delimiter, "comma")
        return f"{len(cells)} cells, the header has {len(header)}: put a caption that holds a {kind} in quotes"
    return _typed(dict(zip(header, cells, strict=False)))


def _typed(cells: dict[str, Any]) -> dict[str, Any]:
    """Convert cells to what JSON would hold: a list for several captions, nothing for an empty cell."""
    several = cells.get("captions")
    if several and several.lstrip().startswith("["):
        try:
            cells["captions"] = json.loads(several)
        except (ValueError, RecursionError):
            return cells  # a caption may begin with a bracket
    return cells


# --- .parquet and .arrow ----------------------------------------------------------------------------------------------


def _columnar(table: Path, files: Files, maps: bool) -> Iterator[tuple[int, Any]]:
    with embedded.opened(table, _COLUMNS, files) as file:
        names = file.schema_arrow.names
        columns = embedded.image_columns(file)
        class_names = embedded.class_names(file, "label")
        _need_columns(table, names, has_images=bool(columns), has_captions=bool(class_names))
        holds_maps = embedded.holds_images(file, embedded.SALIENCY)
        texts = (*_FILE_FIELDS, *FIELDS, "label", *(() if holds_maps else (embedded.SALIENCY,)))
        wanted = [name for name in texts if name in names and name not in columns]
        pictures = [*columns[:1], *([embedded.SALIENCY] if holds_maps and maps else [])]
        number = 0
        for batch in file.iter_batches(batch_size=512 if pictures else 4096, columns=[*wanted, *pictures]):
            images = embedded.images_of(batch, columns[0]) if columns else None
            values: dict[str, list[Any]] = {name: embedded.values_of(batch.column(name)) for name in wanted}
            if embedded.SALIENCY in pictures:
                values[embedded.SALIENCY] = embedded.images_of(batch, embedded.SALIENCY)
            for place in range(len(batch)):
                fields = {name: column[place] for name, column in values.items()}
                number += 1
                yield number, _with_image(fields, images[place] if images else None, class_names)


def _with_image(fields: dict[str, Any], image: Any, class_names: list[str]) -> Any:
    """Add the image that the row holds itself, and the name of its class where the table has no captions."""
    if image is not None:
        if image.size < 0 and not image.path:
            return "it holds no picture"
        fields = {**fields, "file": image.path if image.size < 0 else image}
    label = fields.get("label")
    if class_names and not any(name in fields for name in FIELDS) and isinstance(label, int):
        fields["caption"] = class_names[label] if 0 <= label < len(class_names) else None
    return fields


def _need_columns(table: Path, names: list[str], *, has_images: bool = False, has_captions: bool = False) -> None:
    known = set(names)
    if not (has_images or known & set(_FILE_FIELDS)) or not (has_captions or known & set(FIELDS)):
        listed = ", ".join(shown(name) for name in names) or "none"
        raise DataError(f"{table}: columns {listed}; {_COLUMNS}")


def _refuse_utf16(table: Path, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start[:4]:
        raise DataError(f"{table}: not UTF-8 text (UTF-16?); save it as UTF-8")


TABLE_KINDS: dict[str, Callable[[Path, Files, bool], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _columnar,
    ".arrow": _columnar,
}
