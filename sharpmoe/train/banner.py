"""What a run says before its first step."""

import torch

from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout
from sharpmoe.model.dit import DiT, count_parameters
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train.provenance import versions


def banner(run: RunConfig, model: DiT, layout: BatchLayout, stage: int, world: World) -> str:
    """Lay out model size, world, batch arithmetic and versions, a line each. `stage` is ZeRO's."""
    total, active = count_parameters(model)
    config = run.model
    moe = "" if not config.family.has_experts else f", {config.num_experts} experts in {len(model.moe_layers())} layers"
    rollout = "1 time" if run.stage == "pretrain" else f"T = {run.rollout.num_steps}, {run.rollout.schedule}"
    rows = {
        "run": f"{run.name}: {run.stage}, {run.train.steps} steps, seed {run.seed}",
        "model": f"{config.router} DiT {config.width}/{config.depth}/{config.num_heads}{moe}, {config.conditioning}",
        "parameters": f"{total / 1e6:.3f} M total, {active / 1e6:.3f} M active per token",
        "world": f"{world.size} rank(s) on {world.device.type}, ZeRO-{stage}, {run.train.precision}{_experts(run)}",
        "batch": f"{layout.global_batch} = {layout.micro_batch} per rank x {layout.accumulation} accumulation x "
        f"{layout.world} rank(s)",
        "rollout": f"{rollout}, {config.num_tokens} tokens per image",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "threads": f"{torch.get_num_threads()} per rank",
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in rows.items())


def _experts(run: RunConfig) -> str:
    parallel = run.parallel
    return "" if parallel.ep_size == 1 else f", experts over {parallel.ep_size} ranks ({parallel.dispatcher})"
