"""Write docs/configuration.md, the keys of `sharpmoe.config.RunConfig`: `python docs/make_configuration.py`.

A key's description is the comment at the end of its line, or the comment lines directly above it.
"""

import ast
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sharpmoe import config, config_io
from sharpmoe.architectures import ARCHITECTURES
from sharpmoe.families import FAMILIES, Family

PAGE = Path(__file__).resolve().parent / "configuration.md"
HEAD = """# Keys of a run file

`python docs/make_configuration.py` writes this page from `sharpmoe.config.RunConfig`; `tests/contract/test_docs.py`
compares them. A run file (YAML, `configs/runs/`) sets what differs from the defaults; the command line overrides it, as
`--train.steps 500` does. Engine keys (ZeRO stage, buckets, offload) are in the DeepSpeed JSON (`configs/zero3.json`).
"""

REPLACED = """`model.router` and `model.backbone` replace defaults of the table above by those of the published models
(keys without a section are of `model`), and where every token gets the same compute `loss.routing_weight` is 0 in a
run file that does not name it. A key that is given keeps its value; where a router and its backbone name one key, the
backbone's value holds. A router or backbone that is not listed replaces nothing."""


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


def _replaced() -> str:
    """Return the table of the defaults that a router, or a backbone, replaces."""
    rows = [_replaced_row("router", name, _fields_of(family)) for name, family in FAMILIES.items()]
    rows += [_replaced_row("backbone", name, each.fields) for name, each in ARCHITECTURES.items()]
    head = "| value | defaults that differ |\n|---|---|"
    return "\n".join(["### Defaults by router and backbone", "", REPLACED, "", head, *filter(None, rows), ""])


def _fields_of(family: Family) -> dict[str, Any]:
    """Return what a router replaces: fields of the model, and the weight that a run file fills in."""
    widths = {key: f"{times} * width" for key, times in family.published_widths.items()}
    return {**family.published, **widths, **({} if family.varies_compute else {"loss.routing_weight": 0.0})}


def _replaced_row(key: str, name: str, fields: Mapping[str, Any]) -> str:
    """Return a row of that table, empty where nothing differs from the default of the key."""
    plain = config.ModelConfig.model_fields
    differs = {each: value for each, value in fields.items() if each not in plain or plain[each].default != value}
    shown = ", ".join(
        f"`{each}: {value if isinstance(value, str) else json.dumps(value)}`" for each, value in differs.items()
    )
    return f"| `{key}: {name}` | {shown} |" if differs else ""


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [HEAD, _table("The run", config.RunConfig, "")]
    for name, field in config.RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts.append(_table(f"`{name}`", field.annotation, f"{name}."))
            if field.annotation is config.ModelConfig:
                parts.append(_replaced())
    return "\n".join(parts)


def _table(title: str, section: type[BaseModel], prefix: str) -> str:
    head = "| key | default | values | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {title}", "", inspect.getdoc(section) or "", "", head, *_rows(section, prefix), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
