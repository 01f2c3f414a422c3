"""What a run was started with, and what is different when it goes on. No communication."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpmoe.config import RunConfig
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.parallel.ranks.launch import World

_PACKAGES = ("sharpmoe", "torch", "deepspeed", "megatron-core")
_TO_BE_EXPECTED = ("checkpoint.resume",)  # says where to go on from: never the same twice

Settings = dict[str, Any]  # dotted key -> JSON value
Changes = dict[str, tuple[Any, Any]]  # dotted key -> (value before, value now)


def versions() -> dict[str, str]:
    """Versions of what computes: Python, packages, and the commit of the code where it is a git checkout."""
    found = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def settings(run: RunConfig, ds_config: Mapping[str, Any], world: World) -> Settings:
    """Everything that a run is started with, flat: the run file's keys, zero.*, version.*, world."""
    parts = {**run.model_dump(mode="json"), "zero": dict(ds_config), "version": versions()}
    parts |= {"world": world.size, "device": world.device.type}
    return dict(_flat(json.loads(json.dumps(parts))))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """All that differs; a key that one side lacks counts as null there."""
    keys = [key for key in {**before, **now} if key not in _TO_BE_EXPECTED]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def in_words(changed: Changes) -> str:
    """Lay out changes as one line."""
    if not changed:
        return "nothing changed in configuration and versions"
    return "changed: " + ", ".join(f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in changed.items())


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit(root: Path = PROJECT_ROOT) -> str:
    """Abbreviated commit, with -dirty where files differ from it; empty outside of a checkout."""
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
