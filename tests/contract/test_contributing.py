"""The worked pages for contributors: their code runs from top to bottom, and what they add is found by the rest."""

import re
from pathlib import Path

import pytest
import torch

from data_pipeline.sources import open as sources
from sharpmoe import checkpoint
from sharpmoe.architectures import ARCHITECTURES
from sharpmoe.families import FAMILIES
from sharpmoe.model.build import BACKBONES
from sharpmoe.moe.selection import RULES
from sharpmoe.train.rollout_schedules import SCHEDULES

PAGES = Path(__file__).resolve().parents[2] / "docs" / "contributing"
TABLES = (FAMILIES, RULES, SCHEDULES, ARCHITECTURES, BACKBONES)  # what the pages add a row to


@pytest.fixture(autouse=True)
def _same_tables_afterwards(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES)
    before = [dict(table) for table in TABLES]
    yield
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)


def blocks(page: Path) -> str:
    """Return the Python blocks of a page as one program; its line numbers are those of the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    return "\n".join(lines)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    program = blocks(page)
    assert re.search(r"^assert ", program, re.MULTILINE)
    exec(compile(program, str(page), "exec"), {"__name__": page.stem})  # noqa: S102


def walks() -> dict[str, list[str]]:
    """Return the files of every walk in docs/contributing.md, in order."""
    text = (PAGES.parent / "contributing.md").read_text(encoding="utf-8")
    sections = text.split("\n## Five walks\n")[1].split("\n## ")[0].split("\n### ")[1:]
    return {section.split("\n")[0]: re.findall(r"^\d+\. `([\w/.]+)`: ", section, re.MULTILINE) for section in sections}


@pytest.mark.parametrize("walk", walks())
def test_a_walk_enters_each_file_once(walk):
    files = walks()[walk]
    assert len(files) >= 5
    assert sorted(set(files)) == sorted(files)
    assert [file for file in files if not (PAGES.parents[1] / file).is_file()] == []


def test_there_are_five_walks_and_a_checkpoint_crosses_seven_files_at_most():
    assert len(walks()) == 5
    assert len(walks()["A piece of a checkpoint, out and back"]) <= 7


def test_the_walk_of_a_checkpoint_is_that_of_its_package():
    docstring = checkpoint.__doc__ or ""
    listed = re.findall(r"^\d+\. `([\w/.]+)`: ", docstring, re.MULTILINE)
    assert [f"sharpmoe/{file}" for file in listed] == walks()["A piece of a checkpoint, out and back"]
