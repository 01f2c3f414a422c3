"""The rest of the code uses one class of the checkpoint package, records, and four functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLASS, RECORDS = (
    "Checkpoints",
    {
        "export_adapters",
        "generators_kept",
        "latest",
        "newest_first",
        "Contents",
        "Cutoffs",
        "Found",
        "Manifest",
        "Outcome",
        "Progress",
        "RunIdentity",
        "Watch",
    },
)
SOURCES = [
    path
    for package in ("sharpmoe", "launcher", "data_pipeline")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.parent.name != "checkpoint" and "sharpmoe.checkpoint" in path.read_text(encoding="utf-8")
]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sharpmoe.checkpoint"):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("sharpmoe.checkpoint")}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_class_and_records_are_imported(path: Path) -> None:
    assert imported(path) <= {CLASS, *RECORDS}


def test_the_class_is_used() -> None:
    used = set().union(*(imported(path) for path in SOURCES))
    assert used == {CLASS, *RECORDS}
