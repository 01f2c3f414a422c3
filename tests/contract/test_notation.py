"""Every name of docs/notation.md is a name of the code: the last column is resolved in the syntax tree."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from sharpmoe.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = re.compile(r"`((?:config|[\w/]+\.py)::[^`]+)`")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def rows() -> list[tuple[str, list[str]]]:
    """Return (name, references) of every row of every table."""
    found = []
    for line in (ROOT / "docs" / "notation.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 5 and cells[1].startswith("`"):
            found.append((cells[1].strip("`"), REFERENCE.findall(cells[4])))
    return found


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def member(body: list[ast.stmt], name: str) -> ast.AST | None:
    """Return the definition of `name` in a module's or a class's body: a class, a function, a field, an attribute."""
    for node in body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
            return node
        if any(isinstance(target, ast.Name) and target.id == name for target in targets(node)):
            return node
    for method in body:
        for node in ast.walk(method) if isinstance(method, FUNCTIONS) else ():
            if isinstance(node, ast.stmt) and any(
                isinstance(target, ast.Attribute) and ast.unparse(target) == f"self.{name}" for target in targets(node)
            ):
                return node
    return None


def config_key(dotted: str) -> bool:
    values = RunConfig().model_dump()
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def resolve(reference: str) -> bool:
    path, dotted = reference.split("::")
    if path == "config":
        return config_key(dotted)
    if not (ROOT / path).is_file():
        return False
    dotted, _, parameter = dotted.rstrip(")").partition("(")
    node: ast.AST | None = tree(path)
    for part in dotted.split("."):
        node = member(getattr(node, "body", []), part) if node is not None else None
    if not parameter:
        return node is not None
    if not isinstance(node, FUNCTIONS):
        return False
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return parameter in [argument.arg for argument in arguments]


def last_name(reference: str) -> str:
    return re.split(r"[.(:]+", reference.rstrip(")"))[-1]


@pytest.mark.parametrize(("name", "references"), rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_name_is_one_of_the_code(name, references):
    assert references, f"{name}: the row names no code"
    assert [each for each in references if last_name(each) != name] == []
    assert [each for each in references if not resolve(each)] == []


@pytest.mark.parametrize(
    "reference",
    [
        "sharpmoe/flow.py::interpolate(x2)",
        "sharpmoe/flow.py::no_such_function",
        "sharpmoe/rollout.py::Item.x2",
        "sharpmoe/moe/layer.py::MoELayer.no_such_attribute",
        "sharpmoe/no_such_file.py::x0",
        "config::loss.no_such_key",
    ],
)
def test_a_renamed_identifier_is_noticed(reference):
    assert not resolve(reference)


def test_no_name_has_two_rows_in_a_table():
    text = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
    for table in text.split("\n## ")[1:]:
        names = re.findall(r"^\|[^|]*\| `(\w+)` \|", table, re.MULTILINE)
        assert sorted(set(names)) == sorted(names)
        assert names
