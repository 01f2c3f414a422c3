"""A training step of DiffMoE against the same step with its MoE layers in the published form.

    python -m benchmarks.train_step [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--check]

A plain denoising step in one process: forward, flow and capacity losses, backward, clipping, AdamW (fused), EMA and
thresholds. In bf16 the optimizer holds float32 weights, as the engine does. The reference is a step of
KwaiVGI/DiffMoE's train.py: its MoE layers, torch's default AdamW, and the EMA one parameter at a time
(`benchmarks/published.py` describes how they run in bf16). Before timing, the gradients of both are compared. In
`train_step.layers` the reference uses our update, so that only the MoE layers differ; in `train_step.engine` ours is
the step of a run: the same step of the ZeRO-3 engine, which in one process copies what it would send.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, main, sizes_for
from benchmarks.models import drawn_model
from benchmarks.published import (
    THRESHOLD_DECAY,
    assert_close,
    gradients,
    published_model,
    stacked,
)
from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.flow import interpolate, velocity_target
from sharpmoe.losses import HEAD_LOSSES, flow_matching
from sharpmoe.model.backbone import Backbone, ClassCondition
from sharpmoe.moe.routing import Routing
from sharpmoe.moe.thresholds import threshold_candidates, update_thresholds
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import train_step

ZERO3 = Path(__file__).resolve().parents[1] / "configs" / "zero3.json"
CAPACITY_WEIGHT, LR, CLIP, EMA = 0.01, 1e-4, 1.0, 0.9999
TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2}  # of gradients, against the largest magnitude of each
RATIO = {"cpu": 1.05, "cuda": 1.5}


class Size(NamedTuple):
    """A model and a batch."""

    preset: str
    depth: int
    images: int

    def config(self) -> ModelConfig:
        """Return a configuration with sixteen experts and without a saliency router, which the published form lacks."""
        fields = {"preset": self.preset, "depth": self.depth, "num_experts": 16, "saliency_router": False}
        return ModelConfig.model_validate(fields | {"router": "diffmoe", "conditioning": "class"})

    def __str__(self) -> str:
        return f"{self.preset}_depth{self.depth}_{self.images}_images"


# Ours and the published step hold 24 bytes per parameter each in bf16; two blocks of L have 166 million parameters.
SIZES: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny", 2, 1)]},
    "cpu": {0: [Size("s", 4, 8), Size("b", 2, 8)]},
    "cuda": {
        0: [Size("l", 2, 4)],
        22: [Size("l", 4, 8)],
        36: [Size("l", 4, 32)],
        72: [Size("l", 8, 32)],
        130: [Size("l", 16, 32)],
    },
}


def cases(options: Options) -> Iterator[Planned]:
    for kind, build in {"diffmoe": published_step, "layers": layers, "engine": engine_step}.items():
        for size in sizes_for(SIZES, options):
            act = partial(build, size.config(), size.images, str(size), options)
            yield Planned(f"train_step.{kind}_{size}", act)


def published_step(config: ModelConfig, images: int, size: str, options: Options) -> Case:
    """Return a whole step against a whole published step."""
    return _against(PublishedStep, f"diffmoe_{size}", config, images, options, Goals(RATIO[options.device.type]))


def layers(config: ModelConfig, images: int, size: str, options: Options) -> Case:
    """Return a whole step against one that differs only in the form of its MoE layers."""
    return _against(PublishedLayers, f"layers_{size}", config, images, options, Goals())


def engine_step(config: ModelConfig, images: int, size: str, options: Options) -> Case:
    """Return the engine's step against a whole published step."""
    model = make_model(config, options)
    theirs = PublishedStep(published_model(model), images, options)
    ours = EngineStep(model, theirs, options)

    def check() -> None:
        expected = torch.stack([gradient.double().norm() for gradient in theirs.gradients().values()]).norm().item()
        norm = ours.norm()
        assert abs(norm / expected - 1) < TOLERANCE[options.precision], (norm, expected)

    return Case(f"train_step.engine_{size}", ours, theirs, None, Goals(), check)


def _against(
    published: "type[Step]", name: str, config: ModelConfig, images: int, options: Options, goals: Goals
) -> Case:
    model = make_model(config, options)
    ours, theirs = Step(model, images, options), published(published_model(model), images, options)

    def check() -> None:
        got, expected = (stacked(step.gradients()) for step in (ours, theirs))
        assert_close(got, expected, TOLERANCE[options.precision])

    facts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    return Case(f"train_step.{name}", ours, theirs, None, goals, check, facts)


def make_model(config: ModelConfig, options: Options) -> Backbone:
    """Return a model for ours and the reference, buffers in the precision of the options too."""
    return drawn_model(config, options.device, options.dtype).to(options.dtype)


class Step:
    """One model, its optimizer and its EMA, on a fixed batch."""

    fused: bool | None = True

    def __init__(self, model: Backbone, images: int, options: Options) -> None:
        config, g = model.config, torch.Generator().manual_seed(1)
        shape = (images, config.latent_channels, config.latent_size, config.latent_size)
        self.x0, self.x1 = (torch.randn(shape, generator=g).to(options.device) for _ in range(2))
        self.t = torch.rand(images, generator=g).to(options.device)
        labels = torch.randint(config.num_classes, (images,), generator=g)
        self.model, self.condition = model, ClassCondition(labels.to(options.device))
        self.parameters: list[Tensor] = list(model.parameters())
        # In float32 they share the memory of the parameters.
        self.masters: list[Tensor] = [Parameter(parameter.detach().float()) for parameter in self.parameters]
        pairs = zip(self.parameters, self.masters, strict=True)
        self.rounded = [pair for pair in pairs if pair[0].dtype != pair[1].dtype]
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, weight_decay=0.0, fused=self.fused)
        self.layers = [block.moe for block in model.blocks if block.moe is not None]
        self.thresholds = [torch.zeros(config.num_experts, device=options.device) for _ in self.layers]

    def __call__(self) -> int:
        self.update(self.backward())
        return 1

    def backward(self) -> tuple[Routing, ...]:
        """Compute losses and their gradients."""
        self.model.zero_grad()
        output = self.model(interpolate(self.x0, self.x1, self.t), self.t, self.condition)
        v_target = velocity_target(self.x0, self.x1)
        capacity = HEAD_LOSSES["capacity"].function(output.routing, v_target, self.model.config.patch_size)
        (flow_matching(output.v, v_target) + CAPACITY_WEIGHT * capacity).backward()
        routing: tuple[Routing, ...] = output.routing
        return routing

    @torch.no_grad()
    def update(self, routing: tuple[Routing, ...]) -> None:
        """Clip gradients, update weights, EMA and thresholds."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        if self.rounded:
            torch._foreach_copy_([pair[0] for pair in self.rounded], [pair[1] for pair in self.rounded])
        self.move_average()
        self.move_thresholds(routing)

    def move_thresholds(self, routing: tuple[Routing, ...]) -> None:
        """Update the thresholds of all layers at once."""
        candidates = threshold_candidates(routing, self.model.config)
        update_thresholds(self.thresholds, candidates, THRESHOLD_DECAY)

    def move_average(self) -> None:
        """Update the EMA of all parameters at once."""
        torch._foreach_lerp_(self.average, self.masters, 1 - EMA)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients without taking a step."""
        self.backward()
        return gradients(self.model)


class PublishedLayers(Step):
    """A step whose MoE layers update their thresholds themselves."""

    def move_thresholds(self, routing: tuple[Routing, ...]) -> None:
        """Do nothing: the forward has updated them."""


class PublishedStep(PublishedLayers):
    """A step that also has the update of published DiT code."""

    fused = None  # torch's default: one kernel per operation, not per update

    def move_average(self) -> None:
        """Update the EMA one parameter at a time."""
        for average, master in zip(self.average, self.masters, strict=True):
            average.mul_(EMA).add_(master, alpha=1 - EMA)


class EngineStep:
    """The step of a run, on the batch of another step."""

    def __init__(self, model: Backbone, given: Step, options: Options) -> None:
        images, world = len(given.x0), launch.start()
        run = RunConfig.model_validate(
            {
                "output": "none",
                "stage": "pretrain",
                "model": model.config.model_dump(),
                "data": {"shards": "none"},
                "loss": {"capacity_weight": CAPACITY_WEIGHT},
                "optim": {"lr": LR, "clip_norm": CLIP, "ema_decay": EMA, "threshold_decay": THRESHOLD_DECAY},
                "train": {"global_batch": images, "micro_batch": images, "precision": options.precision},
            }
        )
        self.objective = Objective(model, run)
        self.engine = Engine(self.objective, run, resolve_ds_config(ZERO3, run, world.size), world)
        self.average = ShardEma(self.engine, EMA)
        self.item = TrajectoryBatch(given.x0, given.x1, given.t.unsqueeze(0), given.condition, torch.zeros(images, 1))
        self.taken = 0

    def __call__(self) -> int:
        self.norm()
        return 1

    def norm(self) -> float:
        """Take one step and return the norm of its gradient before clipping."""
        result = train_step(self.engine, self.objective, self.average, [self.item], self.taken, with_routing=False)
        self.taken += 1
        return result.grad_norm


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
