"""Small runs on drawn shapes, shared by the training tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.train.setup import RunPlan, make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = {"width": 24, "depth": 4, "num_heads": 2, "latent_size": 8, "num_experts": 4}
ALONE = World(0, 1, 0, torch.device("cpu"))


def make_run(shards: Path, output: Path, router: str = "diffmoe", **sections: dict[str, Any]) -> RunConfig:
    """A post-training run of three rollout steps: 8 images a step, in micro-batches of 4."""
    weight = {"routing_weight": 0.5} if router in ("ec", "diffmoe") else {}
    values: dict[str, Any] = {
        "output": str(output),
        "model": MODEL | {"router": router, "text_width": 32, "pooled_width": 32},
        "data": {"shards": str(shards)},
        "rollout": {"num_steps": 3},
        "loss": {"capacity_weight": 0.3} | weight,
        "optim": {"lr": 0.01, "clip_norm": 0.5, "ema_decay": 0.9, "threshold_decay": 0.8},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 4},
        "log": {"every": 1, "validate_every": 0, "validation_images": 4, "allocation": False, "report": False},
        "checkpoint": {"every": 0, "resume": "none"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return RunConfig.model_validate(values)


def plan_for(run: RunConfig, world: World, stage: int = 3) -> RunPlan:
    return make_plan(run, resolve_ds_config(CONFIGS / f"zero{stage}.json", run, world.size), world)


def stirred_model(run: RunConfig) -> Backbone:
    """A seeded model whose every parameter matters: zero-initialised ones are moved."""
    torch.manual_seed(0)
    model = build_model(run.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two state dicts."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
