"""How commands are spelled in messages: as the user calls them, in a checkout, elsewhere and after an installation."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.main import _LAUNCHERS
from launcher.sample import main as sample
from sharpmoe import invocation
from sharpmoe.config_names import ELSEWHERE, suggestion
from sharpmoe.invocation import spell_command, spell_ranks_command, spell_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sharpmoe", "data_pipeline", "launcher")
NAMES = "|".join(re.escape(name) for name in _LAUNCHERS)
HARD_CODED = re.compile(rf"launcher/\w+\.py|\b(?:{NAMES})\.py\b|\bsharpmoe (?:{NAMES})\b(?!:)")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the string constants of a file with their lines, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_no_message_hard_codes_how_a_command_is_called() -> None:
    """A file name alone, a part of a path, is no message."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in texts(path)
        if HARD_CODED.search(text) and not re.fullmatch(r"\w+\.py", text)
    ]
    assert found == [], "spell them with sharpmoe.invocation.spell_command"


def test_in_a_checkout_and_outside_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launcher/train.py"])
    assert spell_command("gpu-check") == "python launcher/gpu_check.py"
    assert spell_ranks_command("deepspeed --num_gpus 2", "train") == "deepspeed --num_gpus 2 launcher/train.py"
    monkeypatch.chdir(tmp_path)
    for started in (str(ROOT / "launcher" / "train.py"), "mine.py", "-c"):
        monkeypatch.setattr(sys, "argv", [started])
        assert spell_command("sample") == f"python {ROOT / 'launcher' / 'sample.py'}"


@pytest.mark.parametrize("argv", [["/usr/bin/sharpmoe"], ["launcher/train.py"]])
def test_the_console_command_and_an_installed_package(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(invocation, "IS_INSTALLED", len(argv[0].split("/")) == 2)
    assert spell_command("gpu-check") == "sharpmoe gpu-check"
    assert spell_ranks_command("torchrun --nproc_per_node 2", "train") == (
        "torchrun --nproc_per_node 2 --module launcher.train"
    )
    text = "Start it: `deepspeed launcher/train.py --x` or `python\nlauncher/sample.py RUN`; see launcher/gpu_check.py."
    assert spell_text(text) == (
        "Start it: `deepspeed --module launcher.train --x` or `sharpmoe sample RUN`; see sharpmoe gpu-check."
    )
    assert ".py" not in sample.parser("sharpmoe sample").format_help()
    assert suggestion("compile", ()) == "; here it is: train.compile (sharpmoe sample has --compile)"
    launched = "the launcher decides: deepspeed --num_gpus N --module launcher.train ..."
    assert suggestion("num_gpus", ()) == f"; here it is: {launched}"


def test_every_command_that_a_hint_names_exists() -> None:
    named = {word for hint in ELSEWHERE.values() for word in re.findall(r"{(\w+)}", hint)}
    assert {word.removesuffix("_script") for word in named} <= {*_LAUNCHERS}
    assert len(named) > 3
