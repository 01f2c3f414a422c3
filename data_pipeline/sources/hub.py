"""Data sets of Hugging Face by path: downloads of the hub, .parquet files, and .arrow files of `datasets`."""

import re
from pathlib import Path

from data_pipeline.sources.items import SPLIT_FOLDERS, Skipped
from data_pipeline.sources.tables import Table
from data_pipeline.sources.walk import walk_folders
from sharpmoe.errors import DataError

_OWN_FOLDERS = (".", "data")  # of a set with one configuration
_NAMES = "|".join(SPLIT_FOLDERS)  # in the names of files as well
_FIRST = re.compile(rf"({_NAMES})(?:[-._].*)?")  # train-00000-of-00002
_LAST = re.compile(rf".*-({_NAMES})(?:-\d+-of-\d+)?")  # name-train-00000-of-00002, in the cache of load_dataset


def snapshot_of(path: Path) -> Path | None:
    """Return the files of a download of the hub (models--, datasets--), whose folder holds blobs and snapshots.

    None where the folder is no such download. Raises DataError where it holds several revisions and none is `main`.
    """
    snapshots = path / "snapshots"
    if not (snapshots.is_dir() and (path / "blobs").is_dir()):
        return None
    found = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = path / "refs" / "main"
    revision = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    if revision not in found and len(found) != 1:
        raise DataError(f"{path}: holds the revisions {', '.join(found) or 'none'}; name one as {snapshots}/REVISION")
    return snapshots / (revision if revision in found else found[0])


def find_tables(path: Path, nested: bool) -> list[Table]:
    """Return the .parquet files of a set, or its .arrow files where it has none, with their splits.

    They are in the folder or in data/; or with `nested` in one configuration below it. Splits are drawn where no table
    is held out. Left alone are the tables of img2dataset beside its tars, and the caches of `map` and `filter`.
    Raises DataError where there are several configurations.
    """
    for suffix in (".parquet", ".arrow"):
        found = _tables(path, suffix)
        own = [table for table in found if table.parent.relative_to(path).as_posix() in _OWN_FOLDERS]
        if own or (nested and found):
            return _with_splits(own or _one_configuration(path, found))
    return []


def _tables(path: Path, suffix: str) -> list[Path]:
    found = []
    for entry in walk_folders(path) if path.is_dir() else ():
        if not isinstance(entry, Skipped):
            folder, names = entry
            beside = {Path(name).stem for name in names if name.lower().endswith(".tar")}
            found += [
                folder / name
                for name in names
                if name.lower().endswith(suffix)
                and Path(name).stem not in beside
                and not name.startswith(("cache-", "._"))
            ]
    return sorted(found)


def _one_configuration(path: Path, tables: list[Path]) -> list[Path]:
    folders = sorted({_configuration(table.parent) for table in tables})
    if len(folders) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in folders[:10])
        raise DataError(f"{path}: holds several sets of tables ({names}); name one of these folders with --source")
    return tables


def _configuration(folder: Path) -> Path:
    return folder.parent if folder.name in SPLIT_FOLDERS else folder


def _with_splits(tables: list[Path]) -> list[Table]:
    splits = [_split(table) for table in tables]
    if "unseen" not in splits:
        return [Table(table) for table in tables]
    return [Table(table, split or "train") for table, split in zip(tables, splits, strict=True)]


def _split(table: Path) -> str:
    """Return the split that a table's name or folder says, or ""."""
    stem = table.stem.lower()
    match = _FIRST.fullmatch(stem) or (_LAST.fullmatch(stem) if table.suffix.lower() == ".arrow" else None)
    return SPLIT_FOLDERS[match.group(1)] if match else SPLIT_FOLDERS.get(table.parent.name.lower(), "")
