"""What a run was started with, what is different when it resumes, and the banner. No communication."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sharpmoe import __version__
from sharpmoe.config import RunConfig
from sharpmoe.config_io import PROJECT_ROOT, BatchLayout
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.matrices import optimizer_title
from sharpmoe.model.trainable import trained_title
from sharpmoe.parallel.ranks.launch import World

_PACKAGES = ("torch", "deepspeed", "megatron-core")
_EXPECTED = ("checkpoint.resume",)  # says where to resume from: different each time

Settings = dict[str, Any]  # dotted key -> JSON value
Changes = dict[str, tuple[Any, Any]]  # dotted key -> (value before, value now)


def banner(run: RunConfig, model: Backbone, layout: BatchLayout, zero: str, world: World, tokens: Sequence[int]) -> str:
    """Return what a run prints before its first step: size, world, batch arithmetic, versions.

    `zero`: `settings.zero_title`; `tokens` of an image, for every resolution of the data, the fewest first.
    """
    total, active = model.count_parameters()
    trained = trained_title(run, sum(p.numel() for p in model.parameters() if p.requires_grad))
    optimizer = optimizer_title(model, run)
    config, parallel = run.model, run.parallel
    moe = "" if not config.family.has_experts else f", {config.num_experts} experts in {len(model.moe_layers())} layers"
    experts = "" if parallel.ep_size == 1 else f", experts over {parallel.ep_size} ranks ({parallel.dispatcher})"
    rollout = "1 time" if run.stage == "pretrain" else f"T = {run.rollout.num_steps}, {run.rollout.schedule}"
    rows = {
        "run": f"{run.name}: {run.stage}, {run.train.steps} steps, seed {run.seed}",
        "model": f"{config.title}{moe}, {config.conditioning}",
        "parameters": f"{total / 1e6:.3f} M total, {active / 1e6:.3f} M active per token",
        **({"trained": trained} if trained else {}),
        **({"optimizer": optimizer} if optimizer else {}),
        "world": f"{world.size} rank(s) on {world.device.type}, {zero}, {run.train.precision}{experts}",
        "batch": f"{layout.global_batch} = {layout.micro_batch} per rank x {layout.accumulation} accumulation x "
        f"{layout.world} rank(s)",
        "rollout": f"{rollout}, {' to '.join(map(str, dict.fromkeys((tokens[0], tokens[-1]))))} tokens per image",
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "repeatable": _repeatable(run, world),
        "threads": f"{torch.get_num_threads()} per rank, on {_count_cpus()} CPU(s)",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in rows.items())


def _count_cpus() -> int:
    """Return on how many CPUs this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _repeatable(run: RunConfig, world: World) -> str:
    """Return how far a run that is started again, or resumed, repeats what it computed."""
    if run.train.deterministic:
        return "bit for bit on the same devices and versions (train.deterministic)"
    if world.device.type == "cuda":
        return "to rounding; with train.deterministic bit for bit (slower)"
    return "bit for bit on the same kind of host"


def _versions() -> dict[str, str]:
    """Return the versions of Python, of the packages, and the commit of the code where it is a git checkout."""
    found = {"python": platform.python_version(), "sharpmoe": __version__}
    found |= {name: _version(name) for name in _PACKAGES}
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def settings(run: RunConfig, ds_config: Mapping[str, Any], world: World) -> Settings:
    """Return everything that a run is started with, flat: the run file's keys, zero.*, version.*, world."""
    parts = {**run.model_dump(mode="json"), "zero": dict(ds_config), "version": _versions()}
    parts |= {"world": world.size, "device": world.device.type}
    return dict(_flat(json.loads(json.dumps(parts))))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return all that differs; a key that one side lacks counts as null there."""
    keys = [key for key in {**before, **now} if key not in _EXPECTED]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def changes_text(changed: Changes) -> str:
    """Return changes as one line."""
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
