"""Command-line overrides of a run: values taken as the shell gives them, by the type of their key. No torch.

A text key takes its text as it is: no YAML comment, no `~` as null, no 1:30 as 90, no `yes` as true. Numbers are
decimal. Lists and maps are written in YAML's flow form, [0.9, 0.95] and {path: a, weight: 1}; null or none is accepted
by keys that may be null. Run files are read by the same rules for what a scalar means, as far as YAML allows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError, first_line

_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NULLS = ("null", "none", "None")


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn `--a.b value` and `--a.b=value` words into {"a.b": value}; the last of two equal keys wins.

    The value of a key that the run does not have stays text. Raises ConfigError where a word is not an override, has no
    value, or a list or map cannot be read.
    """
    given: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"argument {word!r} is not an override; write overrides as --section.key value")
        key, equals, text = word[2:].partition("=")
        kind = _kind_of(key)
        if not equals:
            if not queue or queue[0].startswith("--"):
                if kind is None:  # a flag of another program: the key is what is wrong
                    given[key] = ""
                    continue
                raise ConfigError(f"--{key} has no value; write --{key} VALUE or --{key}=VALUE")
            text = queue.pop(0)
        given[key] = _typed(kind, _flow(key, text) if _in_flow_form(kind, text) else text)
    return given


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Rejects a key written twice (YAML forbids it, PyYAML keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


class StrictLoader(_UniqueKeys, yaml.SafeLoader):
    """SafeLoader without what YAML 1.2 has dropped: 1:30 as 90, 010 as 8, yes and off as booleans, dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [
            (tag, regex) for tag, regex in found if tag.rpartition(":")[2] not in ("bool", "int", "float", "timestamp")
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), list(_first))


class _TextLoader(_UniqueKeys, yaml.BaseLoader):
    """Reads lists and maps whose scalars all stay text."""


def yaml_problem(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """Return where and what is wrong with a YAML text, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _kind_of(dotted: str) -> Any:
    """Return the annotation of a key of the run, None where there is no such key."""
    entry = entry_of_map(dotted)
    return _field_kind(dotted.split(".")) if entry is None else get_args(_field_kind(entry[0].split(".")))[1]


def _field_kind(parts: Sequence[str]) -> Any:
    kind: Any = RunConfig
    for part in parts:
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or part not in kind.model_fields:
            return None
        kind = kind.model_fields[part].annotation
    return kind


def entry_of_map(dotted: str) -> tuple[str, str] | None:
    """Return (key of the map, name in it) for a dotted key below a map such as optim.lr_scale, else None."""
    parts = dotted.split(".")
    for at in range(1, len(parts)):
        if get_origin(_field_kind(parts[:at])) is dict:
            return ".".join(parts[:at]), ".".join(parts[at:])
    return None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _in_flow_form(kind: Any, text: str) -> bool:
    """Whether a value is a list or a map: of a key that may be text too only where it begins with a bracket."""
    parts = _alternatives(kind)
    container = any(get_origin(part) in (tuple, dict) or _is_section(part) for part in parts)
    return container and (str not in parts or text.lstrip().startswith("["))


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _flow(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: {text!r} is not valid YAML: {yaml_problem(error)}; quote it") from None


def _typed(kind: Any, node: Any) -> Any:
    """Convert the text of a value, and the texts in a list or map, to the type that its key has.

    What is not of that type stays text, and is refused with the rest of the configuration.
    """
    parts = _alternatives(kind)
    if isinstance(node, list):
        return [_typed(element, part) for element, part in zip(_elements(parts, len(node)), node, strict=True)]
    if isinstance(node, dict):
        section = next((part for part in parts if _is_section(part)), None)
        fields = section.model_fields if section is not None else {}
        of_map = next((get_args(part)[1] for part in parts if get_origin(part) is dict), str)
        return {key: _typed(fields[key].annotation if key in fields else of_map, value) for key, value in node.items()}
    if not isinstance(node, str):
        return node
    if NoneType in parts and node in _NULLS:
        return None
    if any(part in (int, float) or part in _numbers(parts) for part in parts):
        return int(node) if _WHOLE.fullmatch(node) else float(node) if _DECIMAL.fullmatch(node) else node
    return node


def _numbers(parts: Sequence[Any]) -> list[Any]:
    """Return those types that are a number with bounds: Annotated[float, ...]."""
    return [part for part in parts if get_args(part)[:1] in ((int,), (float,)) and get_origin(part) is not Literal]


def _elements(parts: Sequence[Any], count: int) -> list[Any]:
    """Return the types of `count` elements of the list type among `parts`; text where there is none or too few."""
    kinds = next((list(get_args(part)) for part in parts if get_origin(part) is tuple), [str])
    if kinds[-1] is Ellipsis:
        return kinds[:1] * count
    return (kinds + [str] * count)[:count]
