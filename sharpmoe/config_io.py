"""Read a run: YAML file and dotted overrides to `RunConfig`, errors to one line. No torch.

There is no inheritance, include or interpolation: a run file has all that differs from the defaults in config.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sharpmoe.config import ModelConfig, OneOf, RunConfig
from sharpmoe.config_names import suggestion
from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES
from sharpmoe.overrides import StrictLoader, entry_of_map, parse_overrides, yaml_problem
from sharpmoe.shipped_files import SHIPPED_ROOT, find_shipped

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RUN_CONFIG = SHIPPED_ROOT / "configs" / "runs" / "quickstart.yaml"
DEFAULT_DS_CONFIG = SHIPPED_ROOT / "configs" / "zero3.json"

_TYPE_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text (quote it)",
    bool: "true | false",
    type(None): "null",
}


class BatchLayout(NamedTuple):
    """How the samples of an optimizer step are divided: global_batch = micro_batch * accumulation * world."""

    micro_batch: int  # samples per rank and engine call
    accumulation: int  # engine calls per optimizer step
    global_batch: int  # samples per optimizer step, over all ranks
    world: int  # data-parallel ranks


def load_run_config(
    path: str | Path | None, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run file, apply `--section.key value` overrides, check everything.

    Args:
        path: YAML file, or the name of a shipped one (`find_shipped`); None is configs/runs/quickstart.yaml.
        overrides: command-line words, `--section.key value` or `--section.key=value`: see `parse_overrides`.
        changes: sections and keys as in a run file, over those of the file and below the overrides.

    Raises:
        ConfigError: one line with the file or override, the key, what was given, what is allowed and how to fix it.
    """
    path = DEFAULT_RUN_CONFIG if path is None else find_shipped(path)
    given = parse_overrides(overrides)
    data = merge_settings(_read_yaml(path), changes or {})
    for key, value in given.items():
        _set(data, _parts(key), value)
    _check_keys(data, str(path), given)
    _fill_routing_weight(data)
    try:
        run = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_one_line(error, str(path), given)) from None
    _check_across_sections(run, str(path))
    return run


def merge_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with `changes` over them; maps are merged, all else is replaced."""
    found = dict(base)
    for key, value in changes.items():
        below = found.get(key)
        found[key] = (
            merge_settings(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return found


def dump_run_config(run: RunConfig) -> str:
    """Return the resolved configuration as YAML; `load_run_config` of it gives `run` again."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def batch_arithmetic(run: RunConfig, world: int) -> BatchLayout:
    """Divide the global batch into micro-batches for `world` data-parallel ranks. No communication.

    Raises:
        ConfigError: the global batch cannot be divided evenly.
    """
    total, micro = run.train.global_batch, run.train.micro_batch
    if world < 1:
        raise ConfigError(f"world size is {world}, expected at least 1; start the run with `deepspeed` or `torchrun`")
    if total % world:
        raise ConfigError(
            f"train.global_batch is {total}, which {world} ranks cannot share evenly; "
            f"set train.global_batch to {_round_up(total, world)}, or start a number of ranks that divides {total}"
        )
    share = total // world
    if micro is None:
        return BatchLayout(share, 1, total, world)
    if share % micro:
        allowed = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        raise ConfigError(
            f"train.micro_batch is {micro}, but each of {world} ranks has {share} of the {total} samples of a step; "
            f"set train.micro_batch to a divisor of {share}: {allowed}"
        )
    return BatchLayout(micro, share // micro, total, world)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name closest to `word`, or "" when none is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"run file {path} is a folder, expected a YAML file; add a file name")
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"run file {path} does not exist{_there_are(others, path.parent)}")
    if not path.stat().st_size:
        raise ConfigError(f"run file {path} is empty, as a broken copy leaves it; copy or write it again")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {yaml_problem(error)}; fix the syntax there") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected sections like `train:` with keys below them")
    return {key: {} if value is None and _sections(RunConfig).get(key) else value for key, value in data.items()}


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set `value` at the dotted key; a mapping is merged into the section, anything else, `{}` too, replaces it."""
    for key in keys[:-1]:
        below = data.get(key)
        data[key] = below = dict(below) if isinstance(below, dict) else {}
        data = below
    last, old = keys[-1], data.get(keys[-1])
    data[last] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) and value else value


def _parts(key: str) -> list[str]:
    """Return the names that lead to a dotted key; an entry of a map may have dots of its own."""
    entry = entry_of_map(key)
    return key.split(".") if entry is None else [*entry[0].split("."), entry[1]]


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Return the section class of every field, None for a plain value."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None for name, kind in kinds.items()
    }


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, section in _sections(model).items():
        keys += [prefix + name] + (_dotted_keys(section, f"{prefix}{name}.") if section else [])
    return keys


def _check_keys(data: Mapping[Any, Any], path: str, given: Mapping[str, Any]) -> None:
    """Reject unknown keys before pydantic does, with the nearest key of the whole configuration."""
    known = _dotted_keys(RunConfig)
    for key in [*given, *_written_keys(data, RunConfig)]:
        if key not in known and entry_of_map(key) is None:
            raise ConfigError(f"{_place(key, path, given)}: unknown key{_suggest(key, known)}")


def _written_keys(node: Mapping[Any, Any], section: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in node.items():
        below = _sections(section).get(name)
        keys.append(f"{prefix}{name}")
        keys += _written_keys(value, below, f"{prefix}{name}.") if below and isinstance(value, Mapping) else []
    return keys


def _suggest(dotted: str, known: Sequence[str]) -> str:
    section = dotted.rpartition(".")[0]
    neighbours = [key for key in known if key.rpartition(".")[0] == section]
    return suggestion(dotted, known) or f"; known here: {', '.join(neighbours) or ', '.join(_sections(RunConfig))}"


def _place(dotted: str, path: str, given: Mapping[str, Any]) -> str:
    """Return where a key was given: the override, or the file."""
    if any(dotted == key or dotted.startswith(f"{key}.") for key in given):
        return f"--{dotted}"
    if entry := next((key for key in given if entry_of_map(key) and key.startswith(f"{dotted}.")), None):
        return f"--{entry}"
    return f"{path}: {dotted}" if path else dotted


def section_error(error: ValidationError, section: str) -> str:
    """Return one line on what is wrong in a section that was made without a run file."""
    return " | ".join(dict.fromkeys(_described(dict(item), (section,)) for item in error.errors()[:3]))


def _described(item: dict[str, Any], above: tuple[str, ...]) -> str:
    item["loc"] = (*above, *item["loc"])
    if item["type"] == "extra_forbidden":
        key = ".".join(map(str, item["loc"]))
        return f"{key}: unknown key{_suggest(key, _dotted_keys(RunConfig))}"
    return _describe(item, "", {})


def _one_line(error: ValidationError, path: str, given: Mapping[str, Any]) -> str:
    return " | ".join(dict.fromkeys(_describe(dict(item), path, given) for item in error.errors()[:3]))


def _describe(item: dict[str, Any], path: str, given: Mapping[str, Any]) -> str:
    field = _field_path(item["loc"])
    place = _place(field, path, given) if field else path
    if item["type"] == "value_error":  # a check across keys; its message names the keys and the rule
        return f"{place}: {item['ctx']['error']}"
    allowed = _allowed(field) or item["msg"]
    near = nearest(item["input"], allowed.split(" | ")) if isinstance(item["input"], str) else ""
    to = f" to {_as_list(item['input'])}" if item["type"] == "tuple_type" and isinstance(item["input"], str) else ""
    return f"{place}: got {item['input']!r}, allowed: {allowed}{near}; change {field}{to}"


def _as_list(text: str) -> str:
    """Return words with commas as the YAML list that was meant, quoted for a shell where * would expand."""
    parts = [part.strip() for part in text.split(",")]
    if any("*" in part for part in parts):  # at the start of a word of YAML it is an alias
        return '"[' + ", ".join(f"'{part}'" for part in parts) + ']"'
    return f"'[{', '.join(parts)}]'"


def _field_path(loc: Sequence[int | str]) -> str:
    """Return the dotted key of an error's location, without indices and the names of union branches."""
    known, parts, section = _sections(RunConfig), list[str](), True
    for part in loc:
        if section and isinstance(part, str) and part in known:
            parts.append(part)
            below = known[part]
            known, section = (_sections(below), True) if below else ({}, False)
    return ".".join(parts)


def _allowed(dotted: str) -> str:
    """Return what a key accepts, in words: its type or choices, and its bounds."""
    *sections, name = dotted.split(".")
    model: type[BaseModel] = RunConfig
    for section in sections:
        model = _sections(model)[section] or model
    field = model.model_fields[name]
    if _sections(model)[name]:
        return f"a section with the keys {', '.join(_sections(_sections(model)[name]))}"  # type: ignore[arg-type]
    if choices := [str(item) for item in field.metadata if isinstance(item, OneOf)]:
        return choices[0]
    bounds = [_bound(item) for item in field.metadata]
    return " ".join([_type_words(field.annotation), " and ".join(bound for bound in bounds if bound)]).strip()


def _bound(item: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{signs[name]} {getattr(item, name)}" for name in signs if hasattr(item, name))


def _type_words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_type_words(part) for part in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list of {_type_words(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(_type_words(part) for part in args)}"
    if origin is Annotated:
        bounds = [_bound(item) for field in args[1:] for item in getattr(field, "metadata", [field])]
        return " ".join([_type_words(args[0]), " and ".join(bound for bound in bounds if bound)])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"{{{', '.join(kind.model_fields)}}}"
    if origin is dict:
        return f"a map of names to {_type_words(args[1])}"
    if origin is not None:  # Literal
        return " | ".join(str(choice) for choice in args)
    return _TYPE_WORDS.get(kind, str(kind))


def _fill_routing_weight(data: dict[str, Any]) -> None:
    """Set the routing weight to 0 where every token gets the same compute and the run gives no weight."""
    model, loss = data.get("model") or {}, data.setdefault("loss", {})
    if not isinstance(model, dict) or not isinstance(loss, dict):
        return
    family = FAMILIES.get(str(model.get("router", ModelConfig.model_fields["router"].default)))
    if family is None or not family.varies_compute:
        loss.setdefault("routing_weight", 0.0)


def _check_across_sections(run: RunConfig, path: str) -> None:
    """Check rules between keys of different sections."""
    if not run.model.family.varies_compute and run.loss.routing_weight > 0:
        raise ConfigError(
            f"{path}: loss.routing_weight is {run.loss.routing_weight}, but with model.router {run.model.router} every "
            "token gets the same compute and the loss has nothing to move; set loss.routing_weight to 0"
        )
    if run.loss.routing_gradient == "saliency_routers" and not run.model.saliency_router:
        raise ConfigError(
            f"{path}: loss.routing_gradient is saliency_routers, but model.saliency_router is false: nothing would "
            "learn from the routing loss; set loss.routing_gradient to all"
        )
    if run.stage == "posttrain" and run.checkpoint.init is None and run.checkpoint.resume in ("auto", "none"):
        raise ConfigError(
            f"{path}: checkpoint.init is missing: stage posttrain starts from a converged base; name its weights file, "
            "name a checkpoint to go on from in checkpoint.resume, or set stage: pretrain"
        )
    if run.log.sample_every and run.model.conditioning == "text" and not run.sample.captions:
        raise ConfigError(
            f"{path}: log.sample_every is {run.log.sample_every}, but sample.captions is empty; "
            "list the captions to draw, or set log.sample_every to 0"
        )
    without_null = run.model.conditioning == "class" and not run.model.class_dropout
    if run.log.sample_every and without_null and run.sample.cfg_scale != 1:
        raise ConfigError(
            f"{path}: sample.cfg_scale is {run.sample.cfg_scale:g}, but with model.class_dropout false there is no "
            '"no class" to guide away from; set sample.cfg_scale to 1, or log.sample_every to 0'
        )


def _there_are(names: Sequence[str], folder: Path) -> str:
    return f"; {folder} holds {', '.join(names)}" if names else f"; {folder} holds no run files"


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
