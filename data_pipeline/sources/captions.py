"""Captions in the forms that people use: a text file beside an image, a JSON object, a row of a table."""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.sources.items import Captions, is_utf8
from data_pipeline.sources.walk import file_size

FIELDS = ("captions", "caption", "text", "prompt")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # of files beside an image; the first that exists is read
MAX_BYTES = 16 << 20  # of a caption file: longer ones are something else
_TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Za-z]+)?(@\w+)?\.utf8=")  # Tux Paint keeps them under the English line
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # no caption holds them; white space is kept


def _from_field(value: Any) -> Captions | str:
    """Parse a caption, or a list of captions or {"text", "weight"} objects; a text says what is wrong with it.

    Surrounding white space is removed, and empty captions are dropped.
    """
    entries = [_weighted(entry) for entry in (value if isinstance(value, list) else [value])]
    wrong = next((entry for entry in entries if isinstance(entry, str)), None)
    return wrong or tuple(entry for entry in entries if not isinstance(entry, str) and entry[0])


def _weighted(entry: Any) -> tuple[str, float] | str:
    text, weight = (entry.get("text"), entry.get("weight", 1.0)) if isinstance(entry, dict) else (entry, 1.0)
    if not isinstance(text, str):
        return "a caption that is not text"
    if not isinstance(weight, int | float) or not 0 < weight <= sys.float_info.max:
        return f"weight {_shortened(weight)[:20]} of a caption: expected a number above 0"
    if not is_utf8(text):
        return "a caption that is not UTF-8"
    control = _CONTROL.search(text)
    if control is not None:
        return f"a caption with the control character U+{ord(control.group()):04X}"
    return text.strip(), float(weight)


def from_object(fields: dict[str, Any]) -> Captions | str:
    """Return the captions of a JSON object, under the first name of `FIELDS` that it has; a text says what is wrong.

    Empty where there is no caption.
    """
    name = next((name for name in FIELDS if fields.get(name) is not None), None)
    return () if name is None else _from_field(fields[name])


def label_of(value: Any) -> int | str:
    """Return a label, -1 where there is none, or what is wrong with it; 3.0 and "3.0" are 3, as pandas writes them."""
    text = _shortened(value).strip()
    if text.lower() in ("", "nan", "none", "null"):
        return -1
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not number.is_integer() or abs(number) >= 2**31:
        return f"label {text[:40]!r} is not a whole number"
    return max(-1, int(number))


def _shortened(value: Any) -> str:
    """Return a value as text; Python refuses to print numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number of more than 19 digits"
    return "" if value is None else str(value)


def caption_file(image: str, names: Iterable[str]) -> str | None:
    """Return which of the `names` of a folder captions an image: NAME.txt or NAME.jpg.txt, with a suffix in any case.

    `names` is a mapping or a set in which looking up is fast; None where there is no such file.
    """
    for stem in (Path(image).stem, image):
        for suffix in CAPTION_SUFFIXES:
            for spelling in (suffix, suffix.upper(), suffix.title()):
                if stem + spelling in names:
                    return stem + spelling
    return None


def from_file(path: Path) -> Captions | str:
    """Return the captions of a file beside an image, or why there are none."""
    size = file_size(path)  # first: a pipe would wait forever, a device has no end
    if isinstance(size, str):
        return f"caption {path.name} {size if size.startswith('cannot') else f'is {size}'}"
    if size > MAX_BYTES:
        return f"caption {path.name} has {size} bytes, at most {MAX_BYTES} are read"
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"caption {path.name} cannot be read ({error.strerror})"
    parse = from_json_bytes if path.suffix.lower() == ".json" else from_text_bytes
    return parse(content, path.name)


def from_text_bytes(content: bytes, name: str) -> Captions | str:
    """Return the caption of a text file, or why there is none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"caption {name} is not UTF-8 (byte {error.start})"
    if "\0" in text:
        return f"caption {name} is not UTF-8 (NUL at byte {content.index(0)}; UTF-16?)"
    lines = [line for line in text.split("\n") if not _TRANSLATION.match(line)]
    found = _from_field("\n".join(lines))
    return f"caption {name}: {found}" if isinstance(found, str) else found or f"no caption in {name}"


def from_json_bytes(content: bytes, name: str) -> Captions | str:
    """Return the captions of a JSON file, or why there are none."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return f"caption {name} is not JSON"
    found = from_object(tree) if isinstance(tree, dict) else ()
    return f"caption {name}: {found}" if isinstance(found, str) else found or f"no caption in {name}"
