"""Captions in the forms that people use: a text file beside an image, a JSON object, a row of a table."""

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.sources.items import Captions, is_utf8

FIELDS = ("captions", "caption", "text", "prompt")
_TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Za-z]+)?(@\w+)?\.utf8=")  # Tux Paint keeps them under the English line


def _from_field(value: Any) -> Captions | None:
    """Parse a caption, or a list of captions or {"text", "weight"} objects; None where it is none of these.

    Surrounding white space is removed, and empty captions are dropped.
    """
    entries = [_weighted(entry) for entry in (value if isinstance(value, list) else [value])]
    if any(entry is None for entry in entries):
        return None
    return tuple(entry for entry in entries if entry is not None and entry[0])


def _weighted(entry: Any) -> tuple[str, float] | None:
    text, weight = (entry.get("text"), entry.get("weight", 1.0)) if isinstance(entry, dict) else (entry, 1.0)
    if not isinstance(text, str) or not isinstance(weight, int | float):
        return None
    return (text.strip(), float(weight)) if 0 < weight < float("inf") and is_utf8(text) else None


def from_object(fields: dict[str, Any]) -> Captions | None:
    """Return the captions of a JSON object, under the first name of `FIELDS` that it has; None where there are none."""
    name = next((name for name in FIELDS if fields.get(name) is not None), None)
    return None if name is None else _from_field(fields[name])


def beside(image: Path) -> Captions | str:
    """Return the captions of IMAGE.txt, else of IMAGE.json, or why there are none."""
    text, tree = image.with_suffix(".txt"), image.with_suffix(".json")
    if text.is_file():
        return from_text_bytes(text.read_bytes(), text.name)
    return from_json_bytes(tree.read_bytes(), tree.name) if tree.is_file() else f"no caption in {text.name}"


def from_text_bytes(content: bytes, name: str) -> Captions | str:
    """Return the caption of a text file, or why there is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"caption {name} is not UTF-8 (byte {error.start})"
    lines = [line for line in text.split("\n") if not _TRANSLATION.match(line)]
    return _from_field("\n".join(lines)) or f"no caption in {name}"


def from_json_bytes(content: bytes, name: str) -> Captions | str:
    """Return the captions of a JSON file, or why there are none."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return f"caption {name} is not JSON"
    return (from_object(tree) if isinstance(tree, dict) else None) or f"no caption in {name}"
