"""The last step of a preparation: the index of a folder whose shards are complete, and a summary of it."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.encode.build import CODEC_FILE
from data_pipeline.identity import Identity
from data_pipeline.index import (
    EMPTY_FILE,
    INDEX_FILE,
    LISTED_SKIPPED,
    Bucket,
    Index,
    Shard,
    ShardTable,
    index_bytes,
    parse_index,
    parse_table,
)
from data_pipeline.members import encode_json
from data_pipeline.prepare.buckets import Resolution
from data_pipeline.prepare.counts import Counts, left_out_lines, read_counts, write_counts
from data_pipeline.prepare.encoding import Worker, stored_array, text_arrays
from data_pipeline.prepare.plan import ShardPlan
from data_pipeline.prepare.recipe import RECIPE_FILE, Recipe, saliency_lines
from data_pipeline.prepare.survey import Catalog
from data_pipeline.sources.items import Skipped, shown
from sharpmoe.durable import remove_drafts, sha256_of, write_atomically
from sharpmoe.errors import DataError

SKIPPED_FILE = "skipped.jsonl"
_COUNTS_FILE = ".counts"
WORK_FOLDER = ".work"
FOLDER_FILES = (RECIPE_FILE, CODEC_FILE, EMPTY_FILE, SKIPPED_FILE, _COUNTS_FILE, INDEX_FILE)  # beside the shards
_SHOWN = 50  # skipped images that a summary names


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a folder holds after `prepare_shards`."""

    folder: Path
    splits: dict[str, int] = field(default_factory=dict)  # samples
    buckets: dict[str, Bucket] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)  # images of the source that the shards lack; the first 1000
    num_skipped: int = 0
    table: list[str] = field(default_factory=list)  # lines: taken, left out for which reason, enlarged, cut
    worked: bool = True  # False where the folder was complete before
    complete: bool = True  # False where other ranks have not yet written their shards

    def skipped_lines(self) -> list[str]:
        """Name the images that were left out, at most 50 of them."""
        lines = [f"skipped {shown(entry.name)}: {shown(entry.reason)}" for entry in self.skipped[:_SHOWN]]
        if self.num_skipped > _SHOWN:
            lines.append(f"... {self.num_skipped} in all, see {self.folder / SKIPPED_FILE}")
        return lines

    def line(self) -> str:
        """Say what was done and what the folder holds."""
        splits = ", ".join(f"{name} {count}" for name, count in self.splits.items())
        state = "prepared" if self.worked else "was complete, nothing to do"
        latents = ", ".join(str(bucket.latent) for bucket in self.buckets.values())
        return f"{self.folder}: {state}: {splits}; latents {latents}; {self.num_skipped} left out"


def complete_index(folder: Path) -> Index | None:
    """Return the index of a folder whose files all exist in full size; damage inside them is found on reading."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    index = parse_index(path.read_bytes(), str(path))
    whole = all(_is_written(folder, shard.name, shard.size) for shard in index.shards)
    return index if whole and all((folder / name).is_file() for name in index.files) else None


def _is_written(folder: Path, name: str, size: int) -> bool:
    """Return whether a shard and its table exist."""
    tar = folder / f"{name}.tar"
    return (folder / f"{name}.json").is_file() and tar.is_file() and tar.stat().st_size == size


def table_of(folder: Path, name: str) -> ShardTable | None:
    """Return the table of a shard that is complete, else None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    table = parse_table(path.read_bytes(), str(path))
    return table if _is_written(folder, name, table.size) else None


def refuse_bad_share(skipped: list[Skipped], count: int, total: int, allowed: float) -> None:
    """Raise a DataError that names some of them where more than the allowed share of all images cannot be used."""
    share = count / max(1, total)
    if share > allowed:
        names = "; ".join(f"{shown(entry.name)}: {shown(entry.reason)}" for entry in skipped[:3]) + (
            "; ..." if count > 3 else ""
        )
        raise DataError(
            f"{count} pictures ({share:.1%}) cannot be used, at most {allowed:.1%} may be skipped "
            f"({names}); correct them, or raise --max-bad-share"
        )


def counts_file(work: Path, shard: str) -> Path:
    """Return the file with the counts of a shard, which lasts until the folder is complete."""
    return work / f"{shard}.counts"


def write_index(
    folder: Path,
    work: Path,
    worker: Worker,
    catalog: Catalog,
    *,
    source: Identity,
    every: list[ShardPlan],
    resolutions: list[Resolution],
) -> Index:
    """Write the index of a folder whose shards are all complete, and remove the working files."""
    arrays = text_arrays(worker.encoder.encode([""]), 0, worker.recipe.text_dtype)
    empty = {name: stored_array(tensor) for name, tensor in arrays.items()}
    write_atomically(folder / EMPTY_FILE, _npz(empty))
    shards, longest, skipped = _collect(folder, every, catalog)
    bad = [entry for entry in skipped if not entry.beside]
    refuse_bad_share(bad, len(bad), catalog.total + sum(1 for _ in catalog.bad()), worker.recipe.max_bad_share)
    _write_skipped(folder, skipped)
    counts = {entry.name: sum(s.num_samples for s in shards if s.bucket == entry.name) for entry in resolutions}
    index = Index(
        source=source,
        buckets={e.name: Bucket(e.image, e.latent, e.grid, counts[e.name]) for e in resolutions if _used(e, shards)},
        patch_size=worker.recipe.patch_size,
        text_length=max(len(empty["text"]), longest),
        text_width=empty["text"].shape[1],
        pooled_width=empty["pooled"].shape[0] if "pooled" in empty else 0,
        codec=worker.codec.identity,
        encoder=worker.encoder.identity,
        splits={
            split: sum(s.num_samples for s in shards if s.split == split) for split in sorted({s.split for s in shards})
        },
        shards=shards,
        files={name: sha256_of(folder / name) for name in (CODEC_FILE, EMPTY_FILE)},
        skipped=[(entry.name, entry.reason) for entry in skipped[:LISTED_SKIPPED]],
        saliency=worker.recipe.saliency.identity,
        text_dtype=worker.recipe.text_dtype,
    )
    write_counts(folder / _COUNTS_FILE, sum((read_counts(counts_file(work, plan.name)) for plan in every), Counts()))
    write_atomically(folder / INDEX_FILE, index_bytes(index))
    remove_work_files(folder)
    return index


def index_files(folder: Path) -> list[Path]:
    """Return the files of a complete folder that are not of one shard, the index last."""
    return [folder / name for name in FOLDER_FILES if name != RECIPE_FILE and (folder / name).exists()]


def remove_work_files(folder: Path) -> None:
    """Remove what only the preparation needed, if it is still there."""
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    remove_drafts(folder)


def _used(resolution: Resolution, shards: list[Shard]) -> bool:
    return any(shard.bucket == resolution.name for shard in shards)


def _collect(folder: Path, every: list[ShardPlan], catalog: Catalog) -> tuple[list[Shard], int, list[Skipped]]:
    """Return the shards, the tokens of the longest text, and all images that were left out."""
    shards, longest, skipped = [], 0, list(catalog.left_out())
    for plan in every:
        table = table_of(folder, plan.name)
        if table is None:
            raise DataError(f"{folder / plan.name}.tar: removed while others were written; run the same command again")
        shards.append(
            Shard(
                name=plan.name,
                split=plan.split,
                bucket=plan.resolution.name,
                num_samples=len(table.samples),
                size=table.size,
                sha256=table.sha256,
                table_sha256=sha256_of(folder / f"{plan.name}.json"),
            )
        )
        longest = max(longest, table.text_length)
        skipped += [Skipped(*entry) for entry in table.skipped]
    return shards, longest, skipped


def _write_skipped(folder: Path, skipped: list[Skipped]) -> None:
    path = folder / SKIPPED_FILE
    if skipped:
        lines: list[dict[str, Any]] = [{"name": entry.name, "reason": entry.reason} for entry in skipped]
        write_atomically(path, b"".join(encode_json(line) for line in lines))
    else:
        path.unlink(missing_ok=True)


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def summary_of(folder: Path, index: Index, worked: bool, recipe: Recipe) -> Summary:
    """Summarise an index."""
    skipped = [Skipped(*entry) for entry in index.skipped]
    every = skipped if len(skipped) < LISTED_SKIPPED else list(_read_skipped(folder / SKIPPED_FILE))
    targets = [bucket.image for bucket in index.buckets.values()]
    return Summary(
        folder=folder,
        splits=index.splits,
        buckets=index.buckets,
        skipped=skipped,
        num_skipped=len(every),
        table=[
            *left_out_lines(every, sum(index.splits.values()), index.splits),
            *saliency_lines(recipe),
            *read_counts(folder / _COUNTS_FILE).lines(targets, recipe.fit),
        ],
        worked=worked,
    )


def _read_skipped(path: Path) -> Iterator[Skipped]:
    with path.open("rb") as file:
        for line in file:
            entry = json.loads(line)
            yield Skipped(entry["name"], entry["reason"])
