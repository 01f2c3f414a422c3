"""Captions of a set of images: lines of a file, what sample.py wrote beside its pictures, GenEval's metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharpmoe.errors import DataError, first_line

CAPTIONS_FILES = "captions*.json"  # in a folder of pictures: file name -> caption; of several parts, one each
_NOT_LINES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml")
METADATA_FILE = "metadata.jsonl"  # of GenEval, in the folder above that of the pictures


def read_captions(path: Path | str) -> tuple[str, ...]:
    """Read the captions of a text file, one per line; skip blank lines.

    Raises DataError for what is none, also for JSON and tables, whose lines would be drawn as they are.
    """
    if Path(path).suffix.lower() in _NOT_LINES:
        raise DataError(
            f"{path}: is no text file with one caption per line, which is expected here; write the captions to a .txt"
        )
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a caption file ({error}); expected UTF-8 text") from None
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise DataError(f"{path}: holds no captions; expected one per line")
    return captions


def captions_of_files(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """Return the caption of every picture of a folder. Raises DataError for a picture that has none."""
    known: dict[str, str] = {}
    for path in sorted(folder.glob(CAPTIONS_FILES)):
        known |= {str(name): str(caption) for name, caption in _read_json(path).items()}
    return tuple(_caption(folder, path, known) for path in files)


def _caption(folder: Path, path: Path, known: dict[str, str]) -> str:
    name = path.relative_to(folder).as_posix()
    if name in known:
        return known[name]
    metadata = path.parent.parent / METADATA_FILE
    if metadata.is_file():
        prompt = _read_json(metadata).get("prompt")
        if isinstance(prompt, str):
            return prompt
    raise DataError(
        f"{path}: has no caption, neither in {CAPTIONS_FILES} of {folder} nor as prompt in {metadata}; give them with "
        "--captions FILE, one per line"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, expected an object")
    return found
