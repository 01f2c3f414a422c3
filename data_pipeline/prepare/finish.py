"""The last step of a preparation: shards to an index, and what a finished folder says of itself."""

import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.encode.codecs import CODEC_FILE
from data_pipeline.identity import Identity
from data_pipeline.index import (
    EMPTY_FILE,
    INDEX_FILE,
    Bucket,
    Index,
    Shard,
    Table,
    index_bytes,
    parse_index,
    parse_table,
)
from data_pipeline.members import encode_json
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.encoding import Worker, text_arrays
from data_pipeline.prepare.files import file_sha256, remove_temporary, write_atomic
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.survey import Catalog
from data_pipeline.sources.items import Skipped
from sharpmoe.errors import DataError

SKIPPED_FILE = "skipped.jsonl"
WORK_FOLDER = ".work"
_LISTED = 1000  # skipped pictures that the index names itself


class Summary(NamedTuple):
    """What a folder holds after `prepare`."""

    folder: Path
    splits: dict[str, int]
    buckets: dict[str, Bucket]
    skipped: list[Skipped]  # pictures that are in the source and not in the shards; the first thousand
    num_skipped: int
    worked: bool  # False where the folder was complete before
    complete: bool = True  # False where other ranks have still to write their shards


def complete_index(folder: Path) -> Index | None:
    """The index of a folder whose files are all there in full size; damage inside them is found when they are read."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    index = parse_index(path.read_bytes(), str(path))
    whole = all(is_written(folder, shard.name, shard.size) for shard in index.shards)
    return index if whole and all((folder / name).is_file() for name in index.files) else None


def is_written(folder: Path, name: str, size: int) -> bool:
    """Whether a shard and its table are there."""
    tar = folder / f"{name}.tar"
    return (folder / f"{name}.json").is_file() and tar.is_file() and tar.stat().st_size == size


def table_of(folder: Path, name: str) -> Table | None:
    """The table of a shard that is complete, else None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    table = parse_table(path.read_bytes(), str(path))
    return table if is_written(folder, name, table.size) else None


def refuse_bad_share(skipped: list[Skipped], count: int, total: int, allowed: float) -> None:
    """Raise a DataError naming some of them where more than the allowed share of all pictures cannot be used."""
    share = count / max(1, total)
    if share > allowed:
        names = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped[:3]) + ("; ..." if count > 3 else "")
        raise DataError(
            f"{count} pictures ({share:.1%}) cannot be used, at most {allowed:.1%} may be skipped "
            f"({names}); mend them, or raise --max-bad-share"
        )


def write_index(
    folder: Path, worker: Worker, source: Identity, catalog: Catalog, every: list[Plan], resolutions: list[Resolution]
) -> Index:
    """Write the index of a folder whose shards are all there, and clear away the rest."""
    empty = {name: tensor.numpy() for name, tensor in text_arrays(worker.encoder.encode([""]), 0).items()}
    write_atomic(folder / EMPTY_FILE, _npz(empty))
    shards, longest, skipped = _collect(folder, every, catalog)
    refuse_bad_share(skipped, len(skipped), catalog.total + len(catalog.skipped.unit), worker.recipe.max_bad_share)
    _write_skipped(folder, skipped)
    counts = {entry.name: sum(s.num_samples for s in shards if s.bucket == entry.name) for entry in resolutions}
    index = Index(
        source=source,
        buckets={e.name: Bucket(e.image, e.latent, e.grid, counts[e.name]) for e in resolutions if _used(e, shards)},
        patch_size=worker.recipe.patch_size,
        text_length=max(len(empty["text"]), longest),
        text_width=empty["text"].shape[1],
        pooled_width=empty["pooled"].shape[0],
        codec=worker.codec.identity,
        encoder=worker.encoder.identity,
        splits={
            split: sum(s.num_samples for s in shards if s.split == split) for split in sorted({s.split for s in shards})
        },
        shards=shards,
        files={name: file_sha256(folder / name) for name in (CODEC_FILE, EMPTY_FILE)},
        skipped=[(entry.name, entry.reason) for entry in skipped[:_LISTED]],
    )
    write_atomic(folder / INDEX_FILE, index_bytes(index))
    clear_away(folder)
    return index


def clear_away(folder: Path) -> None:
    """Remove what only the work needed; there is nothing where that was done before."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    remove_temporary(folder)


def _used(resolution: Resolution, shards: list[Shard]) -> bool:
    return any(shard.bucket == resolution.name for shard in shards)


def _collect(folder: Path, every: list[Plan], catalog: Catalog) -> tuple[list[Shard], int, list[Skipped]]:
    """Shards, tokens of the longest text, and all pictures left out."""
    shards, longest, skipped = [], 0, list(catalog.left_out())
    for plan in every:
        table = table_of(folder, plan.name)
        if table is None:
            raise DataError(f"{folder / plan.name}.tar: removed while others were written; run the same command again")
        counts = plan.split, plan.resolution.name, len(table.samples), table.size, table.sha256
        shards.append(Shard(plan.name, *counts, file_sha256(folder / f"{plan.name}.json")))
        longest = max(longest, table.text_length)
        skipped += [Skipped(*entry) for entry in table.skipped]
    return shards, longest, skipped


def _write_skipped(folder: Path, skipped: list[Skipped]) -> None:
    path = folder / SKIPPED_FILE
    if skipped:
        lines: list[dict[str, Any]] = [{"name": entry.name, "reason": entry.reason} for entry in skipped]
        write_atomic(path, b"".join(encode_json(line) for line in lines))
    else:
        path.unlink(missing_ok=True)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def summary(folder: Path, index: Index, worked: bool) -> Summary:
    """What an index says."""
    skipped = [Skipped(*entry) for entry in index.skipped]
    count = len(skipped)
    if count == _LISTED:
        with (folder / SKIPPED_FILE).open("rb") as file:
            count = sum(1 for _ in file)
    return Summary(folder, index.splits, index.buckets, skipped, count, worked)
