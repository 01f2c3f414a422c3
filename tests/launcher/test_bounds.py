"""Every number on a command line has bounds: options of all commands, and all keys of the run file."""

import argparse
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from launcher.bounds import SHARE, Real, Whole, png_file
from launcher.main import _LAUNCHERS, main
from launcher.train import main as train
from sharpmoe.config import RunConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.errors import ConfigError


def parsers(name: str) -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """(words before the options, parser) of a command and its subcommands."""
    parser = importlib.import_module(f"launcher.{name.replace('-', '_')}").main.parser()
    yield [name], parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (([name, word], below) for word, below in action.choices.items())


def options() -> Iterator[tuple[list[str], argparse.Action]]:
    for name in _LAUNCHERS:
        for words, parser in parsers(name):
            yield from ((words, action) for action in parser._actions)


def outside(bounds: Whole | Real) -> list[str]:
    """Values that an option with these bounds refuses."""
    values = ["inf", "-inf", "nan", "", "many", "1:30"]
    if isinstance(bounds, Whole):
        values += [str(bounds.least - 1), "-7", "1.5", "1e3", "0x10"]
    else:
        values.append(str(bounds.above) if bounds.above is not None else str(bounds.least - 0.5))
    return values + ([str(bounds.most + 1)] if bounds.most is not None else [])


NUMERIC = [(words, action) for words, action in options() if isinstance(action.type, Whole | Real)]


def test_no_option_is_a_number_without_bounds() -> None:
    plain = [(words, action.option_strings) for words, action in options() if action.type in (int, float)]
    assert plain == []
    assert {words[0] for words, _ in NUMERIC} == set(_LAUNCHERS) - {"diff", "export", "report"}  # which have no numbers


@pytest.mark.parametrize(
    ("words", "action"), NUMERIC, ids=["".join([*words, *action.option_strings[:1]]) for words, action in NUMERIC]
)
def test_an_option_outside_its_bounds_is_one_line(
    words: list[str], action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    option = action.option_strings[0]
    for value in outside(action.type):
        pair = isinstance(action.nargs, int)
        if pair and value.startswith("-"):
            continue  # argparse takes it for an option
        given = [option, *[value] * action.nargs] if pair else [f"{option}={value}"]
        assert main([*words, *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {'/'.join(action.option_strings)}: got {value!r}, allowed: {action.type}")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("bounds", "text", "value"),
    [
        (Whole(0), "0", 0),
        (Whole(1, 3), "3", 3),
        (Real(above=0), "1e-4", 1e-4),
        (Real(least=0), "0", 0.0),
        (SHARE, "1", 1.0),
        (SHARE, ".5", 0.5),
    ],
)
def test_what_is_inside_is_taken(bounds: Whole | Real, text: str, value: float) -> None:
    assert bounds(text) == value


def test_a_picture_is_a_png_file() -> None:
    assert png_file("a/b.PNG") == Path("a/b.PNG")
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: a file whose name ends in .png"):
        png_file("a/b")


def keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, list[Any]]]:
    """(dotted key, annotation, bounds) of every key of the run file."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind, field.metadata


def numbers_of(kind: Any) -> set[Any]:
    """int and float among a type and its parts."""
    inner = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return {kind} & {int, float} if not inner else set().union(*map(numbers_of, inner))


NUMERIC_KEYS = [(key, kind, bounds) for key, kind, bounds in keys() if numbers_of(kind) or key == "data.shards"]
UNBOUNDED = {"model.time_scale", "model.time_shift"}  # any finite number


def below(bounds: list[Any]) -> float | None:
    """The largest half or whole number that the bounds refuse."""
    for bound in bounds:
        if hasattr(bound, "gt"):
            return bound.gt
        if hasattr(bound, "ge"):
            return bound.ge - 1
    return None


def test_every_key_that_is_a_number_has_a_lower_bound() -> None:
    free = {key for key, kind, bounds in NUMERIC_KEYS if below(bounds) is None and get_origin(kind) is not tuple}
    assert free == UNBOUNDED | {
        "data.shards",
        "optim.lr_scale",
        "model.capacities",
        "model.rope_axes",
        "rollout.shift.factor",
        "sample.shift.factor",
    }  # inside a list, a map and a choice: tried below


@pytest.mark.parametrize(("key", "kind", "bounds"), NUMERIC_KEYS, ids=[key for key, _, _ in NUMERIC_KEYS])
def test_a_key_outside_its_bounds_is_one_line(key: str, kind: Any, bounds: list[Any]) -> None:
    least = below(bounds)
    values = ["inf", "-inf", "nan", ".inf", ".nan", "1e999", "many", "1:30"]
    values += ["true"] if kind is not bool else []
    values += [] if least is None else [f"{least:g}", f"{least - 3:g}"]
    values += [f"{bound.lt:g}" for bound in bounds if hasattr(bound, "lt") and bound.lt < 2]
    if get_origin(kind) is tuple:
        values = [f"[{value}, 0.5]" for value in [*values, "1" if key == "optim.betas" else "1.1", "-0.1"]]
    if key == "data.shards":
        values = [f"[{{path: a, weight: {value}}}]" for value in [*values, "0", "-1"]]
    if key == "optim.lr_scale":
        values = [f"{{saliency_router: {value}}}" for value in [*values, "-1", "1e7"]]
    for value in values:
        with pytest.raises(ConfigError) as caught:
            load_run_config(None, [f"--{key}={value}"])
        assert str(caught.value).startswith(f"--{key}: got "), caught.value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [".inf", ".nan", "true", "yes", "1:30"])
def test_a_file_is_held_to_the_same(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"stage: pretrain\noptim: {{lr: {text}}}\ntrain: {{steps: {text}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "run.yaml")
    assert str(caught.value).count("allowed: ") == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.betas", "[0.9,1.5]"), ("optim.lr", "inf"), ("train.steps", "0"), ("sample.seed", "-1")],
)
def test_training_and_its_dry_run_end_with_one_line(
    key: str, value: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for more in (["--dry-run"], []):
        assert train([f"--output={tmp_path}", f"--{key}", value, *more]) == 2
        said = capfd.readouterr().err
        assert f"error: --{key}: got " in said.splitlines()[-1]
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_infinity_is_no_default() -> None:
    run = RunConfig()
    for key, _, _ in keys():
        value: Any = run
        for part in key.split("."):
            value = getattr(value, part)
        assert not isinstance(value, float) or math.isfinite(value)
