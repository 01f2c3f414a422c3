"""docs/troubleshooting.md quotes messages that exist: each is looked for in the texts of the source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"  # where a message has a name or a number


def quoted() -> list[str]:
    """Return the messages of all tables whose first column is `message`."""
    found: list[str] = []
    is_messages = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\) \| |^\| | \|$", line)
        if line.startswith("| "):
            if cells[1] in ("message", "symptom"):
                is_messages = cells[1] == "message"
            elif is_messages:
                found.append(cells[1].replace("\\|", "|").removeprefix("`").removesuffix("`").replace("``", "`"))
    return found


@cache
def templates() -> tuple[str, ...]:
    """Return every text in the source, with VALUE where it is formatted."""
    found: list[str] = []
    for package in ("sharpmoe", "data_pipeline", "launcher"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def exists(message: str) -> bool:
    """Return whether a text of the source contains a message, `...` of which stands for at least one value."""
    pieces = [re.escape(piece) for piece in message.split("...")]
    pattern = re.compile(f"[^{VALUE}]*{VALUE}.*".join(pieces) if len(pieces) > 1 else pieces[0], re.DOTALL)
    return any(pattern.search(text) for text in templates())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert len(message.replace("...", "").strip()) >= 8, "too short to tell one message from another"
    assert exists(message)


def test_a_message_that_is_not_in_the_source_is_found_out() -> None:
    assert len(quoted()) > 50
    assert not exists("no such message anywhere")
    assert not exists("train.global_batch is 32, which")  # values are not part of a text
    assert exists("train.global_batch is ..., which")
