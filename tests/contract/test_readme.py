"""What README, docs and run files tell a user to type exists."""

import argparse
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from sharpmoe.config import RunConfig
from tests.launcher.test_main import INNER, file_of

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs" / "runs").rglob("*.yaml")),
]
FILES = re.compile(
    r"\b((?:launcher|configs|tests|benchmarks|docs|sharpmoe|data_pipeline)/[\w./-]+\.(?:py|yaml|json|md|sh|sbatch))\b"
)
TARGETS = re.compile(r"\bmake ([a-z]+(?:-[a-z]+)*)\b")
OVERRIDES = re.compile(r"--([a-z_]+\.[a-z_]+)\b")
# `python launcher/NAME.py ...` and `sharpmoe NAME ...`, with their words
LAUNCHED = re.compile(
    r"(?:(?<!tests/)launcher/(?=[a-z_]+\.py)|(?:^|`)sharpmoe )([a-z_]+(?:-[a-z]+)?)(?:\.py)?\b([^\n`#]*)", re.MULTILINE
)
HANDS_ON = {"submit": ("prepare", "sample")}  # launchers whose options another one takes as well
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def commands(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return "\n".join(CODE.findall(text))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_named_exist(path):
    named = set(FILES.findall(commands(path)))
    assert sorted(name for name in named if "NAME" not in name and not (ROOT / name).exists()) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_make_targets_named_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(TARGETS.findall(commands(path))) <= targets


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_overrides_named_exist(path):
    known = {
        f"{section}.{key}"
        for section, values in RunConfig().model_dump().items()
        if isinstance(values, dict)
        for key in values
    }
    assert set(OVERRIDES.findall(commands(path))) <= known


@cache
def options_of(launcher: str) -> set[str]:
    """Options of a launcher and of its subcommands; also those of launchers that it passes words on to."""
    found: set[str] = set()
    names = (launcher, *HANDS_ON.get(launcher, ()))
    parsers = [importlib.import_module(f"launcher.{file_of(name)}").main.parser() for name in names]
    while parsers:
        for action in parsers.pop()._actions:
            found.update(action.option_strings)
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_launchers_and_options_named_exist(path):
    text = re.sub(r"\\\n\s*#?", " ", commands(path))
    for launcher, words in LAUNCHED.findall(text):
        if launcher in INNER:
            continue
        known = options_of(launcher)
        options = re.findall(r"(?<!=)(--[a-z][a-z_-]*)(?![\w.-])", words)  # after = it is the option of another command
        unknown = [option for option in options if option not in known and option[2:] not in RunConfig.model_fields]
        assert unknown == [], launcher


def test_the_other_way_to_start_a_launcher_is_checked_too():
    line = "sharpmoe sample runs/x --part 1/2; python launcher/plan.py --world 8; sharpmoe's loss; `sharpmoe NAME ...`"
    assert [name for name, _ in LAUNCHED.findall(line.replace("; ", "\n"))] == ["sample", "plan"]
