"""What README, docs and run files tell a user to type exists."""

import re
from pathlib import Path

import pytest

from sharpmoe.config import RunConfig

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


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_launcher_options_named_exist(path):
    text = re.sub(r"\\\n\s*#?", " ", commands(path))
    for launcher, words in re.findall(r"launcher/([a-z_]+)\.py([^\n`#]*)", text):
        names = (launcher, *HANDS_ON.get(launcher, ()))
        sources = [ROOT / "launcher" / f"{name}.py" for name in names]
        known = "".join(source.read_text(encoding="utf-8") for source in sources)
        options = re.findall(r"(--[a-z][a-z_-]*)(?![\w.-])", words)
        unknown = [option for option in options if f'"{option}"' not in known]
        assert [option for option in unknown if option[2:] not in RunConfig.model_fields] == [], launcher
