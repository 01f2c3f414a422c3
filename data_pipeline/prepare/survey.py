"""What a source holds: listed once by all ranks together and kept on disk, with a few numbers per image in memory.

.work/REQUEST/UNIT.jsonl    one part of the source, listed by the rank that its hash belongs to; complete or absent
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from data_pipeline.prepare.ranks import Rank, pulse, wait
from data_pipeline.sources.animations import TooFewFramesError
from data_pipeline.sources.images import FORMATS, UNREADABLE, upright_size
from data_pipeline.sources.items import ImageSource, Item, Skipped, Unit, from_json, hash_int, shown, to_json
from sharpmoe.durable import publish_once
from sharpmoe.errors import DataError, first_line

_HEADER_BYTES = 1 << 17  # of an image file, mostly enough to know its size

_ROW = np.dtype(
    [
        ("hash", "u8"),
        ("unit", "i4"),
        ("offset", "i8"),
        ("split", "i2"),
        ("height", "i4"),
        ("width", "i4"),
        ("bytes", "i8"),
    ]
)


class _Refs(NamedTuple):
    """Lines of the unit files."""

    unit: np.ndarray  # int32
    offset: np.ndarray  # int64, bytes


class Catalog:
    """All images of a source in the order of their hash, so that every shard and every limited set is a mixture."""

    def __init__(self, folder: Path, digests: list[str], limit: int | None = None) -> None:
        """Read the unit files in `folder`; `limit`: keep only so many images."""
        self._folder, self._digests = folder, digests
        self.split_names: list[str] = []
        parts = [self._read(number) for number in range(len(digests))]
        rows = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, _ROW)
        self.skipped = _joined([part[1] for part in parts])
        order = np.argsort(rows["hash"], kind="stable")
        rows = rows[order]
        self.use = _uses(rows["hash"])  # 0, and 1, 2 ... for further images of one key
        self.total = len(rows)
        rows, self.use = rows[:limit], self.use[:limit]
        self.hash, self.split, self.bytes = rows["hash"], rows["split"], rows["bytes"]
        self.pixels = np.stack([rows["height"], rows["width"]], axis=1)
        self._refs = _Refs(rows["unit"], rows["offset"])

    def __len__(self) -> int:
        return len(self.hash)

    def _read(self, number: int) -> tuple[np.ndarray, _Refs]:
        rows, skipped, offset = [], [], 0
        with self._path(number).open("rb") as file:
            for line in file:
                entry = from_json(line)
                if isinstance(entry, Item):
                    height, width = entry.pixels or (0, 0)
                    key = hash_int(f"order {entry.key}")
                    rows.append((key, number, offset, self._split(entry.split), height, width, entry.image.size))
                else:
                    skipped.append(offset)
                offset += len(line)
        return np.array(rows, _ROW), _Refs(np.full(len(skipped), number, np.int32), np.array(skipped, np.int64))

    def _split(self, name: str) -> int:
        if name not in self.split_names:
            self.split_names.append(name)
        return self.split_names.index(name)

    def items(self, rows: np.ndarray) -> list[Item]:
        """Return the images at these indices."""
        return [self._item(int(row)) for row in rows]

    def _item(self, row: int) -> Item:
        entry = self._line(self._refs, row)
        assert isinstance(entry, Item)
        use = int(self.use[row])
        return replace(entry, key=f"{entry.key}-{use + 1}") if use else entry

    def left_out(self) -> Iterator[Skipped]:
        """Yield the images that the source could not provide, and what else it has seen and not taken."""
        for row in range(len(self.skipped.unit)):
            entry = self._line(self.skipped, row)
            assert isinstance(entry, Skipped)
            yield entry

    def bad(self) -> Iterator[Skipped]:
        """Yield the images that the source could not provide."""
        return (entry for entry in self.left_out() if not entry.beside)

    def _line(self, refs: _Refs, row: int) -> Item | Skipped:
        with self._path(int(refs.unit[row])).open("rb") as file:
            file.seek(int(refs.offset[row]))
            return from_json(file.readline())

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._digests[number]}.jsonl"


def _joined(parts: list[_Refs]) -> _Refs:
    if not parts:
        return _Refs(np.empty(0, np.int32), np.empty(0, np.int64))
    return _Refs(np.concatenate([part.unit for part in parts]), np.concatenate([part.offset for part in parts]))


def _uses(ordered: np.ndarray) -> np.ndarray:
    """Count the equal numbers before each element of a sorted array."""
    places = np.arange(len(ordered))
    first = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.empty(0, bool)
    return places - np.maximum.accumulate(np.where(first, places, 0)) if len(ordered) else places


def survey(
    source: ImageSource,
    folder: Path,
    digests: list[str],
    place: Rank,
    *,
    read_sizes: bool,
    threads: int,
    need_maps: bool = False,
) -> None:
    """List this rank's units into `folder` and wait for those of the others; list those of a rank that has died.

    `read_sizes`: read the size of every image, which buckets need; `need_maps`: leave out images without a saliency
    map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    look = _Look(read_sizes, need_maps)
    _list_units(source, folder, {digest for digest in digests if place.owns(digest)}, look, threads)
    others = set(digests)

    def left() -> list[tuple[int, int]]:
        others.difference_update(path.stem for path in folder.glob("*.jsonl"))
        owners = sorted({place.owner(digest) for digest in others})
        return [(len(others), 0), *((rank, pulse(folder, rank)) for rank in owners)] if others else []

    if not wait(left):
        _list_units(source, folder, others, look, threads)


class _Look(NamedTuple):
    """What is looked at in every image that is listed."""

    sizes: bool
    maps: bool


def _list_units(source: ImageSource, folder: Path, wanted: set[str], look: _Look, threads: int) -> None:
    wanted = {digest for digest in wanted if not (folder / f"{digest}.jsonl").exists()}
    if not wanted:
        return
    with ThreadPoolExecutor(threads) as pool:
        for unit in source.units():
            if unit.digest in wanted:
                _list_unit(source, folder, unit, look, pool)


def _list_unit(source: ImageSource, folder: Path, unit: Unit, look: _Look, pool: ThreadPoolExecutor) -> None:
    entries: Iterator[Item | Skipped] = source.survey(unit)
    if look.maps:
        entries = map(_with_map, entries)
    if look.sizes:
        entries = pool.map(partial(_with_size, source), list(entries))
    content = "".join(to_json(entry) + "\n" for entry in entries)
    publish_once(folder / f"{unit.digest}.jsonl", content.encode())


def _with_map(entry: Item | Skipped) -> Item | Skipped:
    if isinstance(entry, Skipped) or entry.saliency is not None:
        return entry
    return Skipped(entry.name, f"no saliency map ({PurePosixPath(entry.name).stem}.saliency.png)")


def _with_size(source: ImageSource, entry: Item | Skipped) -> Item | Skipped:
    if isinstance(entry, Skipped):
        return entry
    try:
        return replace(entry, pixels=_size(source, entry))
    except UNREADABLE as error:
        return Skipped(entry.name, unreadable(error))


def _size(source: ImageSource, item: Item) -> tuple[int, int]:
    try:
        return upright_size(source.read(item, _HEADER_BYTES))
    except UNREADABLE:
        return upright_size(source.read(item))


def unreadable(error: Exception) -> str:
    """Say why an image cannot be used, in the same words for the same file on every machine."""
    if isinstance(error, TooFewFramesError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):  # its own message holds a memory address
        return f"unreadable: not a picture of a known kind ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.errno is not None:  # their message holds a path
        return f"unreadable: {error.strerror}"
    return f"unreadable: {first_line(error)}"


def refuse_missing(catalog: Catalog, allow: bool) -> None:
    """Raise a DataError naming images that the source lists and that do not exist, unless that is allowed."""
    if allow:
        return
    missing = [entry for entry in catalog.left_out() if entry.missing]
    if missing:
        names = ", ".join(shown(entry.name[:200]) for entry in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(missing) + catalog.total} images are missing ({names}; {missing[0].reason}); "
            "correct the table, or pass --allow-missing to leave them out"
        )
