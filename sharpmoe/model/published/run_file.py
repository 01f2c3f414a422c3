"""Write the run file that post-trains converted weights: their model section, and the settings of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sharpmoe.config import SIZES, ModelConfig
from sharpmoe.config_io import load_run_config
from sharpmoe.durable import atomic_draft
from sharpmoe.errors import ConfigError
from sharpmoe.invocation import spell_command, spell_ranks_command
from sharpmoe.shipped_files import SHIPPED_ROOT

# Data, rollout, optimizer, log and sampling are those of the shipped recipes, which differ in their model and losses.
_RECIPE = SHIPPED_ROOT / "configs" / "runs" / "imagenet256" / "diffmoe_b_sharp.yaml"
# Fields that a run file names even where they are the defaults.
_ALWAYS = ("latent_channels", "latent_size", "patch_size", "learn_sigma", "router", "conditioning")
_CONDITION = {"class": ("num_classes",), "text": ("text_width", "pooled_width")}
_BY_CAPACITY = ("num_experts", "capacity")
_COMPUTE: dict[str | None, tuple[str, ...]] = {  # by what competes
    None: (),
    "token": ("num_experts", "top_k"),
    "image": _BY_CAPACITY,
    "call": _BY_CAPACITY,
    "all": _BY_CAPACITY,
}
_RESOLVED = {"expert_hidden": "expert_width", "shared_hidden": "shared_width"}  # None stands for a computed width

_HEADER = """\
# Question   What does SharpMoE add to {source}?
# Paper      SharpMoE (arXiv 2606.26938): the settings of configs/runs/imagenet256, for this model.
# Base       {init}: {source}, {origin}, converted to a weights file of sharpmoe.
# Cost       not measured; {plan} --config {path} --world 8 estimates memory.
# Command    {train} --deepspeed configs/zero3.json \\
#              --config {path}
# Expected   not measured.
{settings}"""
_MEASURED = """\
# Settings   Those of the paper below moved no compute in the studies of docs/results.md. Those of the quickstart did,
#            at no measurable cost (docs/design/0012-default.md); as words for the command:
#              --rollout.noise markov --loss.routing_weight 0.01 --loss.routing_mass counts --loss.mass_reduction mean
#              --loss.saliency_entropy 0.91 --loss.mass_spread 0.25 --optim.lr_scale '{saliency_router: 20}'
"""


def check_free(path: Path) -> None:
    """Raise ConfigError where a run file exists: it may have been edited, so it is never replaced."""
    if path.exists():
        raise ConfigError(f"--config {path}: exists, and a run file is not overwritten; name another file or remove it")


def write_run_file(
    path: Path, config: ModelConfig, init: Path, *, source: str, origin: str, shards: str | None = None
) -> None:
    """Write a run file of stage posttrain that starts from the weights file `init` of this architecture.

    source, origin: the published file and what it is, for the header. shards: prepared data (default: the recipes').
    The file is read back before it gets its name. Raises ConfigError where it exists.
    """
    check_free(path)
    content: dict[str, Any] = yaml.safe_load(_RECIPE.read_text(encoding="utf-8"))
    content |= {"name": path.stem, "model": _model_section(config)}
    content["checkpoint"] = {**content["checkpoint"], "init": str(init)}
    if shards is not None:
        content["data"] = {**content["data"], "shards": shards}
    if not config.family.varies_compute:
        del content["loss"]  # of the routing loss only: every token gets the same compute
    if config.conditioning == "class" and not config.class_dropout:  # nothing stands for "no class"
        content["rollout"] = {**content["rollout"], "caption_dropout": 0.0}
        content["sample"] = {**content["sample"], "cfg_scale": 1.0}
    plain = " ".join(source.split())
    header = _HEADER.format(
        source=plain,
        init=init,
        origin=origin,
        path=path,
        plan=spell_command("plan"),
        train=spell_ranks_command("deepspeed", "train"),
        settings=_MEASURED if config.family.varies_compute else "",
    )
    with atomic_draft(path) as draft:
        draft.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        load_run_config(draft)


def _model_section(config: ModelConfig) -> dict[str, Any]:
    """Return the model section of a run that adds saliency routers to this architecture: no field that follows."""
    target = config.model_copy(update={"saliency_router": config.family.has_experts})
    size = {name: getattr(config, name) for name in ("width", "depth", "num_heads")}
    preset = next((name for name, known in SIZES.items() if known == size), None)
    named = [*_ALWAYS, *_CONDITION[config.conditioning], *_COMPUTE[config.family.competition], "saliency_router"]
    section: dict[str, Any] = {**({"preset": preset} if preset else size)}
    section |= {name: getattr(target, name) for name in named}
    for name in ModelConfig.model_fields:
        resolved = _RESOLVED.get(name, name)
        if name != "preset" and getattr(ModelConfig(**section), resolved) != getattr(target, resolved):
            section[name] = getattr(target, name)
    return section
