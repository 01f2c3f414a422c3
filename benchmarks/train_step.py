"""A training step of DiffMoE against the same step with its MoE layers in the published form.

    python -m benchmarks.train_step [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--check]

A plain denoising step in one process: forward, flow and capacity losses, backward, clipping, AdamW (fused), the average
of the weights, and the thresholds. In bf16 the optimizer holds float32 weights, as the engine does. Before timing the
gradients of both are compared. In `train_step.diffmoe` the steps differ in nothing but the form of the MoE layers; in
`train_step.published` the reference also updates as published DiT code does: AdamW as torch has it by default, and one
parameter after the other averaged.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.harness import Case, Goals, Options, main
from benchmarks.published import assert_close, gradients, published_model, stacked
from sharpmoe.config import ModelConfig
from sharpmoe.flow import interpolate, velocity_target
from sharpmoe.losses import capacity, flow_matching
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import ClassCondition
from sharpmoe.moe.capacity import threshold_candidates, update_thresholds
from sharpmoe.moe.routing import Routing

CAPACITY_WEIGHT, CLIP, EMA, THRESHOLD_DECAY = 0.01, 1.0, 0.9999, 0.95
TOLERANCE = {"fp32": 1e-4, "bf16": 8e-2}  # of gradients, against the largest magnitude of each
RATIO = {"cpu": 1.05, "cuda": 1.5}


class Size(NamedTuple):
    """A model and a batch."""

    preset: str
    depth: int
    images: int

    def config(self) -> ModelConfig:
        """Sixteen experts; without a saliency router, which the published form has not."""
        fields = {"preset": self.preset, "depth": self.depth, "num_experts": 16, "saliency_router": False}
        return ModelConfig.model_validate(fields | {"router": "diffmoe", "conditioning": "class"})

    def __str__(self) -> str:
        """Part of a case's name."""
        return f"{self.preset}_depth{self.depth}_{self.images}_images"


SIZES = {"cpu": [Size("s", 4, 8), Size("b", 2, 8)], "cuda": [Size("l", 24, 64)]}


def cases(options: Options) -> Iterator[Case]:
    """All cases."""
    sizes = SIZES[options.device.type]
    for size in sizes:
        yield train_step(size.config(), size.images, f"diffmoe_{size}", options)
    yield train_step(sizes[0].config(), sizes[0].images, f"published_{sizes[0]}", options, PublishedUpdate)


def train_step(
    config: ModelConfig, images: int, name: str, options: Options, reference: "type[Step] | None" = None
) -> Case:
    """Both steps; `reference` says how the published one updates, otherwise as ours."""
    model = make_model(config, options)
    ours, theirs = Step(model, images, options), (reference or Step)(published_model(model), images, options)

    def check() -> None:
        got, expected = (stacked(step.gradients()) for step in (ours, theirs))
        assert_close(got, expected, TOLERANCE[options.precision])

    facts = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    goals = Goals(RATIO[options.device.type])
    return Case(f"train_step.{name}", ours, theirs, None, goals, check, facts)


def make_model(config: ModelConfig, options: Options) -> DiT:
    """A model whose every parameter matters: what starts at zero is moved."""
    torch.manual_seed(0)
    model = DiT(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(device=options.device, dtype=options.dtype)


class Step:
    """One model, its optimizer and its average, on a fixed batch."""

    fused: bool | None = True

    def __init__(self, model: DiT, images: int, options: Options) -> None:
        config, g = model.config, torch.Generator().manual_seed(1)
        shape = (images, config.latent_channels, config.latent_size, config.latent_size)
        self.x0, self.x1 = (torch.randn(shape, generator=g).to(options.device) for _ in range(2))
        self.t = torch.rand(images, generator=g).to(options.device)
        labels = torch.randint(config.num_classes, (images,), generator=g)
        self.model, self.condition = model, ClassCondition(labels.to(options.device))
        self.parameters: list[Tensor] = list(model.parameters())
        # In float32 they lie in the same memory as the parameters.
        self.masters: list[Tensor] = [Parameter(parameter.detach().float()) for parameter in self.parameters]
        self.average = [master.detach().clone() for master in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, weight_decay=0.0, fused=self.fused)
        self.layers = [block.moe for block in model.blocks if block.moe is not None]
        self.thresholds = [torch.zeros(config.num_experts, device=options.device) for _ in self.layers]

    def __call__(self) -> int:
        """One step."""
        self.update(self.backward())
        return 1

    def backward(self) -> tuple[Routing, ...]:
        """Losses and their gradients."""
        self.model.zero_grad()
        output = self.model(interpolate(self.x0, self.x1, self.t), self.t, self.condition)
        loss = flow_matching(output.v, velocity_target(self.x0, self.x1))
        (loss + CAPACITY_WEIGHT * capacity(output.routing)).backward()
        routing: tuple[Routing, ...] = output.routing
        return routing

    @torch.no_grad()
    def update(self, routing: tuple[Routing, ...]) -> None:
        """What follows: clipping, weights, average, thresholds."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        if self.masters[0].dtype != self.parameters[0].dtype:
            torch._foreach_copy_(self.parameters, self.masters)
        self.move_average()
        predicted = [record.capacity_logits for record in routing if record.capacity_logits is not None]
        candidates = threshold_candidates(predicted, self.model.config.capacity)
        update_thresholds(self.thresholds, candidates, THRESHOLD_DECAY)

    def move_average(self) -> None:
        """All parameters at once."""
        torch._foreach_lerp_(self.average, self.masters, 1 - EMA)

    def gradients(self) -> dict[str, Tensor]:
        """Of a step that is not taken."""
        self.backward()
        return gradients(self.model)


class PublishedUpdate(Step):
    """The update of published DiT code."""

    fused = None  # torch's default: one kernel per operation, not per update

    def move_average(self) -> None:
        """One parameter after the other."""
        for average, master in zip(self.average, self.masters, strict=True):
            average.mul_(EMA).add_(master, alpha=1 - EMA)


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
