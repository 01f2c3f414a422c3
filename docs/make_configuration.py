"""Write docs/configuration.md, the keys of `sharpmoe.config.RunConfig`: `python docs/make_configuration.py`.

A key's description is the comment at the end of its line, or the comment lines directly above it.
"""

import ast
import inspect
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sharpmoe import config, config_io

PAGE = Path(__file__).resolve().parent / "configuration.md"
HEAD = """# Keys of a run file

`python docs/make_configuration.py` writes this page from `sharpmoe.config.RunConfig`; `tests/contract/test_docs.py`
compares them. A run file (YAML, `configs/runs/`) sets what differs from the defaults; the command line overrides it, as
`--train.steps 500` does. Engine keys (ZeRO stage, buckets, offload) are in the DeepSpeed JSON (`configs/zero3.json`).
"""


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """Return the comment of every field of a section: at the end of its line, else the lines directly above it."""
    lines = inspect.getsource(section).splitlines()
    [tree] = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        assert node.end_lineno is not None
        tail = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        above: list[str] = []
        at = node.lineno - 2
        while at >= 0 and lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip().lstrip("# "))
            at -= 1
        found[node.target.id] = " ".join([*above, tail.lstrip("# ")]).strip()
    return found


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return "`" + json.dumps(value) + "`" if value is not None else "`null`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    comments, rows = _comments(section), []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if prefix:  # a section inside a section: its keys join the table
                rows += _rows(field.annotation, f"{prefix}{name}.")
            continue
        cells = (f"`{prefix}{name}`", _default(field.default), config_io._allowed(prefix + name), comments[name])
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return rows


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [HEAD, _table("The run", config.RunConfig, "")]
    for name, field in config.RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts.append(_table(f"`{name}`", field.annotation, f"{name}."))
    return "\n".join(parts)


def _table(title: str, section: type[BaseModel], prefix: str) -> str:
    head = "| key | default | values | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", inspect.getdoc(section) or "", "", head, *_rows(section, prefix), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
