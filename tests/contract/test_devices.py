"""One module decides which device a process uses; all others are given a device, or ask that module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "sharpmoe" / "devices.py"
SOURCES = [
    path
    for package in ("sharpmoe", "data_pipeline", "launcher", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path != HOME
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ASKING = {"is_available", "device_count", "current_device", "is_initialized"}
PLACES = {"set_rng_state": 2, "empty_cache": 0}  # arguments of a call that names its device; one elsewhere


def asks(text: str) -> Iterator[str]:
    """Places where a source asks which device there is, or leaves it to the device that happens to be current."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in {f"torch.cuda.{word}" for word in ASKING} or name.startswith("torch.accelerator."):
                yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Name | ast.alias) and getattr(node, "id", getattr(node, "name", "")) in (
            "get_accelerator",
            "torch.cuda",
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, given = ast.unparse(node.func), len(node.args) + len(node.keywords)
            if name.startswith("torch.cuda.") and given < PLACES.get(node.func.attr, 1):
                yield f"line {node.lineno}: {name}() without a device"
            if node.func.attr == "cuda" and not node.args:
                yield f"line {node.lineno}: .cuda()"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_is_told_its_device(path: Path) -> None:
    assert list(asks(path.read_text(encoding="utf-8"))) == [], f"{path}: belongs to {HOME.relative_to(ROOT)}"


def test_tests_ask_the_same_module() -> None:
    """Tests marked `gpu` may use the current device; none asks by itself whether there is one."""
    wrong = {
        path.name: found
        for path in TESTS
        if path.parent.name != "gpu"
        and (found := [each for each in asks(path.read_text(encoding="utf-8")) if each.endswith(tuple(ASKING))])
        and "torch.cuda.is_available, torch.cuda.device_count = " not in path.read_text(encoding="utf-8")
    }
    assert wrong == {}


def test_questions_are_recognised() -> None:
    assert len(list(asks(HOME.read_text(encoding="utf-8")))) >= 2
    assert list(asks("import torch\ntorch.cuda.synchronize()")) == ["line 2: torch.cuda.synchronize() without a device"]
    assert list(asks("torch.cuda.synchronize(device)")) == []
    assert list(asks("torch.cuda.set_rng_state(x)")) == ["line 1: torch.cuda.set_rng_state() without a device"]
    assert list(asks("x = model.cuda()")) == ["line 1: .cuda()"]
    assert list(asks("from deepspeed.accelerator import get_accelerator")) == ["line 1: get_accelerator"]
