"""The pins are what is installed, torch comes first, and nothing of an evil name comes along."""

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s#]+)")


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for line in lines(name) if (match := PIN.match(line))]


PINS = pins("requirements.txt") + pins("requirements-nodeps.txt")


@pytest.mark.parametrize(("name", "version"), PINS)
def test_what_is_pinned_is_installed(name, version):
    assert metadata.version(name).split("+")[0] == version


def test_torch_is_the_pinned_release_whatever_its_build():
    assert lines("requirements.txt")[0] == "torch==2.13.0"
    assert torch.__version__.split("+")[0] == "2.13.0"


def test_everything_is_pinned_and_the_project_itself_comes_last():
    names = lines("requirements.txt")
    assert [line for line in names if not PIN.match(line)] == ["-e ."] == names[-1:]


@pytest.mark.parametrize("name", ["apex", "torchvision", "sentence-transformers"])
def test_packages_that_break_or_mislead_are_never_required(name):
    assert name not in {pinned for pinned, _ in PINS}
