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
# Declarations that the pins do not fulfil: pillow 12 does not read small YCbCr TIFFs, and gradio and trackio, which
# declare pillow < 13, run with 13 (tests of the demo and of the trackers). `make extras` puts the pinned pillow back.
UNFULFILLED = {("gradio", "pillow"), ("trackio", "pillow")}


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


def needs_of_optional_packages() -> list[tuple[str, Requirement]]:
    """Return who needs what, from the metadata of what requirements-extras.txt installs beside the pinned packages."""
    pinned = {canonicalize_name(name) for name, _ in PINS}
    needs: dict[str, list[Requirement]] = {}
    pending = [canonicalize_name(name) for name, _ in OPTIONAL]
    while pending:
        name = pending.pop()
        if name in needs or name in pinned:
            continue
        try:
            declared = [Requirement(line) for line in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed; `make extras` installs it")
        needs[name] = [need for need in declared if not need.marker or need.marker.evaluate()]
        pending += [canonicalize_name(need.name) for need in needs[name]]
    return [(name, need) for name, declared in needs.items() for need in declared]


def test_optional_packages_do_not_bring_a_torch_of_their_own():
    """What they need of that kind is pinned in requirements.txt, which `make extras` takes as constraints."""
    brought = {need.name for _, need in needs_of_optional_packages() if re.match("torch|nvidia|cuda|triton", need.name)}
    assert brought <= {name for name, _ in PINS}


def test_the_pins_fulfil_what_optional_packages_declare_but_for_the_named_ones():
    versions = {canonicalize_name(name): version for name, version in PINS + OPTIONAL}
    pinned = [(name, need) for name, need in needs_of_optional_packages() if canonicalize_name(need.name) in versions]
    assert len(pinned) > len(UNFULFILLED)
    broken = {
        (name, need.name)
        for name, need in pinned
        if not need.specifier.contains(versions[canonicalize_name(need.name)])
    }
    assert broken == UNFULFILLED


def test_make_extras_constrains_all_but_pillow_and_puts_it_back():
    """A comment behind the pin would be part of the requirement that the recipe passes on."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("$(EXTRAS):")[1].split("\n\n")[0]
    steps = ["grep -hvE '^(pillow==|-e |#)' requirements.txt requirements-nodeps.txt >", "-r requirements-extras.txt"]
    steps.append('''pip install -qq --no-deps "$$(grep '^pillow==' requirements.txt)"''')
    assert [each for each in steps if each in recipe] == steps
    assert f"pillow=={dict(PINS)['pillow']}" in lines("requirements.txt")


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
