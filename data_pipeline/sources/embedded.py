"""Images inside .parquet and .arrow tables, as Hugging Face writes them: a column of {"bytes": ..., "path": ...}."""

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.safety import LFS_POINTER
from data_pipeline.sources.files import Files
from data_pipeline.sources.items import Place
from sharpmoe.errors import DamageError, DataError, first_line

SALIENCY = "saliency"  # column of saliency maps: their files' names, or the pictures themselves
MAPS = f"#{SALIENCY}"  # ends the file of a place that is in this column of a table
_NAMES = ("image", "img", "jpg", "png", "webp", "file", "picture")  # of columns that may hold images


class EmbeddedImage(NamedTuple):
    """One image of a table."""

    path: str  # its file's name, where the table has one
    size: int  # bytes; -1 where the table names the file only


class EmbeddedImages:
    """Random access to the images of tables.

    A page of a parquet file can only be read as a whole, and shards take images in random order: so all images of a
    table are copied once, by each process, to a temporary file (in TMPDIR) that disappears with the process.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder, self._files = folder, files
        self._copies: dict[str, tuple[BinaryIO, list[int]]] = {}  # by table: the copy, and where each image ends
        self._lock = threading.Lock()

    def read(self, place: Place, limit: int | None = None) -> bytes:
        """Return the image of row `place.offset` (from 1) of the table `place.file`, or the first `limit` bytes.

        Where `place.file` ends in MAPS it is the row's saliency map.
        """
        with self._lock:
            if place.file not in self._copies:
                table = self._folder / place.file.removesuffix(MAPS)
                column = SALIENCY if place.file.endswith(MAPS) else None
                self._copies[place.file] = _copied(table, column, self._files)
        file, ends = self._copies[place.file]
        start, end = (ends[place.offset - 1], ends[place.offset]) if place.offset < len(ends) else (0, -1)
        if end - start != place.size:
            table = self._folder / place.file.removesuffix(MAPS)
            raise DataError(f"{table}: changed since it was listed; prepare into another --out")
        return os.pread(file.fileno(), end - start if limit is None else min(limit, end - start), start)


def _copied(table: Path, column: str | None, files: Files) -> tuple[BinaryIO, list[int]]:
    """Copy the pictures of a column, by default of that of the images; return the copy, and where each ends."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the source)
    ends = [0]
    # What was listed of a damaged table lies before its damage, and listing read larger batches than these.
    with suppress(DamageError), opened(table, "", files) as file:
        column = column or image_columns(file)[0]
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in _bytes_of(batch, column):
                content = value.as_buffer() if value.is_valid else b""
                copy.write(content)
                ends.append(ends[-1] + len(content))
    copy.flush()
    return copy, ends


@contextmanager
def opened(table: Path, expected: str, files: Files) -> Iterator[Any]:
    """Open a .parquet or .arrow file; what is yielded has `schema_arrow` and `iter_batches`, as pyarrow's ParquetFile.

    Raises DamageError where it is not one or is cut short; DataError for a pointer of Git LFS, and without pyarrow.
    """
    kind = table.suffix[1:].lower()
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415  (optional)
    except ImportError:
        raise DataError(
            f"{table}: reading .{kind} needs pyarrow; pip install pyarrow, or save the table as .jsonl or .csv"
        ) from None
    try:
        with files.open(table) as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(f"{table}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
            stream.seek(0)
            if kind == "arrow":
                yield _ArrowFile(stream)
            else:
                with parquet.ParquetFile(stream) as file:
                    yield file
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, and not of the format
            raise
        first = first_line(error)
        raise DamageError(
            f"{table}: not a {'parquet table' if kind == 'parquet' else 'table of arrow'} ({first}); {expected}"
        ) from None


class _ArrowFile:
    """An .arrow file: a stream of batches, as `datasets` writes it, or a file with an index, as Feather."""

    def __init__(self, stream: BinaryIO) -> None:
        from pyarrow import ipc  # noqa: PLC0415  (optional)

        has_index = stream.read(6) == b"ARROW1"
        stream.seek(0)
        file = ipc.open_file(stream) if has_index else ipc.open_stream(stream)
        self.schema_arrow = file.schema
        self._batches: Iterable[Any] = (
            (file.get_batch(number) for number in range(file.num_record_batches)) if has_index else file
        )

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
        """Yield parts of the batches."""
        for batch in self._batches:
            part = batch.select(columns)
            for start in range(0, len(part), batch_size):
                yield part.slice(start, batch_size)


def image_columns(file: Any) -> list[str]:
    """Return the columns that hold images."""
    return [name for name in _NAMES if holds_images(file, name)]


def holds_images(file: Any, column: str) -> bool:
    """Whether a table has a column of pictures: a struct of bytes and path, or plain bytes."""
    from pyarrow import types  # noqa: PLC0415  (optional)

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    schema = file.schema_arrow
    return column in schema.names and holds_bytes(schema.field(column).type)


def images_of(batch: Any, column: str) -> list[EmbeddedImage]:
    """Return the images of a batch of rows, without their bytes."""
    from pyarrow import compute, types  # noqa: PLC0415  (optional)

    values = batch.column(column)
    paths: list[Any] = [None] * len(values)
    if types.is_struct(values.type):
        if values.type.get_field_index("path") >= 0:
            paths = compute.struct_field(values, "path").to_pylist()
        values = compute.struct_field(values, "bytes")
    sizes = compute.binary_length(values).to_pylist()
    pairs = zip(paths, sizes, strict=True)
    return [EmbeddedImage(path if isinstance(path, str) else "", -1 if size is None else size) for path, size in pairs]


def _bytes_of(batch: Any, column: str) -> Any:
    from pyarrow import compute, types  # noqa: PLC0415  (optional)

    values = batch.column(column)
    return compute.struct_field(values, "bytes") if types.is_struct(values.type) else values


def class_names(file: Any, column: str) -> list[str]:
    """Return the names of the classes of a column, where `datasets` has stored them in the file."""
    try:
        stored = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        names = stored["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def values_of(column: Any) -> list[Any]:
    """Return the values of a column; texts that are not UTF-8 with surrogates, as `is_utf8` knows them."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return "\udcff"
