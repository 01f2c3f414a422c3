"""Time of a rollout of T = 10 steps with each schedule, against plain steps of the same model.

    python -m benchmarks.rollout [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--check] [--tiny]

Forward, losses and backward of DiffMoE with saliency routers, without an optimizer. Times are per sample and trained
denoising step; the reference is one such step (T = 1: the same model, losses and images), and for segments, which train
a part of the steps, the plain rollout. Before timing, the gradients of every schedule are compared in float64: they
equal those of the plain rollout to 1e-10; for segments, their mean over all segments does. Facts: calls of the model
with and without a graph, the largest number of bytes that graphs held at one time, and its fraction of that of a plain
step.

On the CPU there are two sizes: `small`, 64 tokens per image, with every schedule, and `s`, two of the twelve layers of
DiffMoE-S with their 256 tokens per image, with the schedules that have a goal.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, main, sizes_for
from benchmarks.memory import SavedBytes
from benchmarks.models import drawn_model
from sharpmoe.config import LossConfig, ModelConfig, RolloutConfig, RunConfig
from sharpmoe.flow import descending_times
from sharpmoe.model.backbone import Backbone, ClassCondition
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.objective import Objective, StepRequest

STEPS, SEGMENT = 10, 5
EXACT = 1e-10  # relative distance of gradients in float64
CHECKED_IMAGES, CHECKED_DEPTH = 2, 2  # gradients are compared on a part of the model
SLOWER = {"plain": 1.05, "two_pass": 1.34}  # goals: at most this multiple of a plain step
SEGMENTS = 0.70  # and this multiple of a plain rollout

SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint": {"schedule": "checkpoint"},
    "two_pass": {"schedule": "two_pass"},
    "two_pass_merged_5": {"schedule": "two_pass", "merged_steps": 5},
    "hybrid_1": {"schedule": "hybrid", "kept_steps": 1},
    "hybrid_5": {"schedule": "hybrid", "kept_steps": 5},
    "segments_5": {"schedule": "segments", "segment_steps": SEGMENT},
}


class Size(NamedTuple):
    """A model, a batch, and the schedules to time."""

    name: str
    model: dict[str, Any]
    images: int
    schedules: Sequence[str] = tuple(SCHEDULES)


SMALL = {"width": 256, "depth": 2, "num_heads": 4, "latent_size": 16, "num_experts": 4, "num_classes": 10}
TOY = {"width": 24, "depth": 2, "num_heads": 2, "latent_size": 8, "num_experts": 4, "num_classes": 5}
IN_TURN = ("plain", "checkpoint", "two_pass", "hybrid_1", "segments_5")
# A step of L keeps about 0.4 GiB per image, one of B 0.15; the graphs of `plain` are ten steps' of them.
SIZES: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny", TOY, 2, ("plain", "two_pass", "segments_5"))]},
    "cpu": {
        0: [
            Size("small", SMALL, 32),
            Size("s", {"preset": "s", "depth": 2, "num_experts": 16}, 16, ("plain", "two_pass", "segments_5")),
        ]
    },
    "cuda": {
        0: [Size("b", {"preset": "b", "num_experts": 8}, 4, IN_TURN)],
        22: [Size("b", {"preset": "b", "num_experts": 8}, 8, IN_TURN)],
        36: [Size("l", {"preset": "l", "num_experts": 8}, 4, IN_TURN)],
        72: [Size("l", {"preset": "l", "num_experts": 8}, 12, IN_TURN)],
        130: [Size("l", {"preset": "l", "num_experts": 8}, 24, IN_TURN)],
    },
}


class Rollout(NamedTuple):
    """A model with a schedule, and a micro-batch."""

    objective: Objective
    item: TrajectoryBatch

    def __call__(self, block: int = 0) -> Tensor:
        """Run forward and backward; return the loss."""
        self.objective.zero_grad()
        loss: Tensor = self.objective(StepRequest((self.item,), block)).loss
        loss.backward()
        return loss

    @property
    def num_steps(self) -> int:
        return len(self.item.times)

    def gradient(self, block: int = 0) -> Tensor:
        """Return all gradients as one vector."""
        self(block)
        parameters = list(self.objective.parameters())
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])

    def under(self, **fields: Any) -> "Rollout":
        """Return the same model and micro-batch with another schedule."""
        rollout = RolloutConfig(num_steps=self.num_steps, **fields)
        return Rollout(
            Objective(self.objective.model, self.objective.run.model_copy(update={"rollout": rollout})), self.item
        )


def cases(options: Options) -> Iterator[Planned]:
    for size in sizes_for(SIZES, options):
        yield from cases_of(size, options)


def cases_of(size: Size, options: Options) -> Iterator[Planned]:
    """Yield the cases of one model, which they share."""
    shared = cache(partial(_Shared.of, size, options))
    for name in size.schedules:
        yield Planned(f"rollout.{size.name}_{name}", partial(_case, name, size, options, shared))


class _Shared(NamedTuple):
    """A plain step, a plain rollout, and the bytes that the graph of the step holds."""

    step: Rollout
    plain: Rollout
    graph: float

    @classmethod
    def of(cls, size: Size, options: Options) -> "_Shared":
        model = make_model(size, options.device, options.dtype)
        step, plain = make_rollout(model, size, 1), make_rollout(model, size, STEPS)
        return cls(step, plain, counted(step)["saved_bytes"])


def _case(name: str, size: Size, options: Options, shared: Callable[[], _Shared]) -> Case:
    fields, (step, plain, graph) = SCHEDULES[name], shared()
    ours = plain.under(**fields)
    is_part = fields.get("schedule") == "segments"
    goals = Goals(1 / SEGMENTS if is_part else 1 / SLOWER[name] if name in SLOWER else None)
    facts = counted(ours)
    facts |= {"of_a_step": facts["saved_bytes"] / graph}
    reference = per_step(plain) if is_part else per_step(step, STEPS)
    check = checking(fields, size, options.device)
    return Case(f"rollout.{size.name}_{name}", per_step(ours), reference, None, goals, check, facts)


def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Return a model of this size. Buffers stay in float32."""
    config = ModelConfig.model_validate({"router": "diffmoe", "conditioning": "class"} | size.model)
    return drawn_model(config, device, dtype)


def make_rollout(model: Backbone, size: Size, steps: int) -> Rollout:
    """Return a plain rollout of `steps` steps; images and noise do not depend on their number."""
    config, parameter = model.config, next(model.parameters())
    g = torch.Generator().manual_seed(1)
    shape = (size.images, config.latent_channels, config.latent_size, config.latent_size)
    x0, x1 = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    labels = torch.randint(config.num_classes, (size.images,), generator=g)
    saliency = torch.rand(size.images, config.num_tokens, generator=g)
    times = descending_times(torch.rand(steps - 1, size.images, generator=g), 0.999)
    x0, x1, times, saliency = (
        value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        for value in (x0, x1, times, saliency)
    )
    run = RunConfig(model=config, rollout=RolloutConfig(num_steps=steps), loss=LossConfig(routing_weight=0.1))
    return Rollout(
        Objective(model, run), TrajectoryBatch(x0, x1, times, ClassCondition(labels.to(parameter.device)), saliency)
    )


def per_step(rollout: Rollout, times: int = 1) -> Callable[[], int]:
    """Return work whose items are samples times steps of the trajectory."""

    def work() -> int:
        for _ in range(times):
            rollout()
        return times * rollout.num_steps * len(rollout.item.x0)

    return work


def counted(rollout: Rollout) -> dict[str, float]:
    """Return calls of the model, and the largest number of bytes that graphs hold at one time."""
    calls = {True: 0, False: 0}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[torch.is_grad_enabled()] += 1

    handle = rollout.objective.model.register_forward_pre_hook(note)
    held = SavedBytes([*rollout.objective.parameters(), *rollout.objective.buffers()])
    with held.watch():
        rollout()
    handle.remove()
    return {"forwards": calls[True], "forwards_without_graph": calls[False], "saved_bytes": held.peak}


def checking(fields: dict[str, Any], size: Size, device: torch.device) -> Callable[[], None]:
    """Compare a schedule's gradient with that of the plain rollout, in float64."""

    def check() -> None:
        fewer = size._replace(images=CHECKED_IMAGES, model=size.model | {"depth": CHECKED_DEPTH})
        plain = make_rollout(make_model(fewer, device, torch.float64), fewer, STEPS)
        expected, ours = plain.gradient(), plain.under(**fields)
        blocks = range(STEPS // SEGMENT) if fields.get("schedule") == "segments" else range(1)
        got = torch.stack([ours.gradient(block) for block in blocks]).mean(0)
        distance = float((got - expected).norm() / expected.norm())
        assert distance < EXACT, f"gradients differ from those of plain by {distance:.1e}"

    return check


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
