"""The pins are what is installed, torch comes first, and nothing of an evil name comes along."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s#]+)")


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for line in lines(name) if (match := PIN.match(line))]


PINS = pins("requirements.txt") + pins("requirements-nodeps.txt")
OPTIONAL = pins("requirements-extras.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
UNPINNED = {"s3fs", "gcsfs"}  # their tests stand in for them


@pytest.mark.parametrize(("name", "version"), PINS)
def test_what_is_pinned_is_installed(name, version):
    assert metadata.version(name).split("+")[0] == version


@pytest.mark.parametrize(("name", "version"), OPTIONAL)
def test_an_optional_package_that_is_installed_is_the_pinned_one(name, version):
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed; `make extras` installs it")
    assert found == version


def test_optional_packages_do_not_bring_a_torch_of_their_own():
    """Everything that requirements-extras.txt installs is found from the metadata of what is there."""
    seen: set[str] = set()
    pending = [canonicalize_name(name) for name, _ in OPTIONAL]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed; `make extras` installs it")
        pending += [canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate()]
    assert len(seen) > len(OPTIONAL)
    assert sorted(name for name in seen if name.startswith(("torch", "nvidia", "cuda", "triton"))) == []


@pytest.mark.parametrize("extra", DECLARED)
def test_what_pyproject_declares_allows_the_pins(extra):
    versions = {canonicalize_name(name): version for name, version in PINS + OPTIONAL}
    for need in map(Requirement, DECLARED[extra]):
        if need.name in UNPINNED:
            assert canonicalize_name(need.name) not in versions
        else:
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), need


def test_every_pin_is_declared_in_pyproject():
    declared = {canonicalize_name(Requirement(line).name) for lines in DECLARED.values() for line in lines}
    assert {canonicalize_name(name) for name, _ in PINS + OPTIONAL} - declared == set()


def test_torch_is_the_pinned_release_whatever_its_build():
    assert lines("requirements.txt")[0] == "torch==2.13.0"
    assert torch.__version__.split("+")[0] == "2.13.0"


def test_everything_is_pinned_and_the_project_itself_comes_last():
    names = lines("requirements.txt")
    assert [line for line in names if not PIN.match(line)] == ["-e ."] == names[-1:]


@pytest.mark.parametrize("name", ["apex", "torchvision", "sentence-transformers"])
def test_packages_that_break_or_mislead_are_never_required(name):
    assert name not in {pinned for pinned, _ in PINS}
