"""Model FLOP utilisation of a training step of DiffMoE-L/2: against the bare products of equal FLOPs and shapes.

    python -m benchmarks.utilisation [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--tiny]

`backward` is forward, losses and backward of a plain denoising step, `step` a whole step (`benchmarks.train_step`),
`guided` a whole step of a model with saliency routers, with x0_prev. The limit consists of their model FLOPs
(`sharpmoe.model.flops`) only, all in the given precision, including those of the routers, which run in float32, and of
experts, which on a CPU without AMX multiply bf16 in float32, faster than the limit does.

On the CPU and on small devices the model has L/2's width, heads, tokens and experts, but fewer blocks (`SIZES`). The
cost of the update does not depend on the batch; it has more weight here than in a run, whose steps have ten times as
many forwards and backwards.
"""

import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch

from benchmarks.gemms import bare, gemms_of
from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, Work, main, sizes_for
from benchmarks.train_step import CAPACITY_WEIGHT, Step, make_model
from sharpmoe.config import ModelConfig
from sharpmoe.families import rows_of_call
from sharpmoe.flow import interpolate, velocity_target
from sharpmoe.losses import HEAD_LOSSES, flow_matching
from sharpmoe.model.flops import Call, backward_flops, forward_flops, products
from sharpmoe.moe.routing import Routing


class Size(NamedTuple):
    """A model and a batch."""

    preset: str
    depth: int
    images: int


SIZES: SizeTable[Size] = {
    "tiny": {0: Size("tiny", 2, 1)},
    "cpu": {0: Size("l", 2, 8)},
    "cuda": {0: Size("l", 4, 8), 22: Size("l", 8, 16), 36: Size("l", 12, 32), 72: Size("l", 24, 64)},
}
OF_LIMIT = {"cpu": 0.80, "cuda": 0.45}


def cases(options: Options) -> Iterator[Planned]:
    size = sizes_for(SIZES, options)
    fields = {"preset": size.preset, "depth": size.depth, "num_experts": 8}
    for guided in (False, True):
        config = ModelConfig.model_validate(
            fields | {"router": "diffmoe", "conditioning": "class", "saliency_router": guided}
        )
        yield from step_cases(config, size.images, options)


def step_cases(config: ModelConfig, images: int, options: Options) -> Iterator[Planned]:
    """Yield steps of a model without and with the update, and of a model with saliency routers with it."""
    shared = cache(partial(_built, config, images, options))
    for work in ("guided",) if config.saliency_router else ("backward", "step"):
        name = f"utilisation.{work}_{options.precision}"
        yield Planned(name, lambda name=name: shared()[name])  # type: ignore[misc]


def _built(config: ModelConfig, images: int, options: Options) -> dict[str, Case]:
    """Return the cases of one model by name."""
    guided = config.saliency_router
    step = (GuidedStep if guided else Step)(make_model(config, options), images, options)
    rows = rows_of_call(config, images, config.num_tokens) * config.num_moe_layers
    done = products(config, Call(images=images, tokens=config.num_tokens, rows=rows, uses_x0_prev=guided))
    forward, backward = forward_flops(done), backward_flops(done)
    total, gemms = forward.total + backward.total, gemms_of(done, config.num_experts)
    limit = counting(bare(gemms, options), images)

    def check() -> None:
        assert sum(gemm.flops for gemm in gemms) == total
        step.backward()
        assert all(torch.isfinite(each.grad).all() for each in step.parameters if each.grad is not None)

    shares = {"routed": forward.routed + backward.routed, "router": forward.router + backward.router}
    facts = {"images": images, "depth": config.depth, "gflop": total / images / 1e9}
    facts |= {f"{part}_share": flops / total for part, flops in shares.items()}
    goals = Goals(of_limit=OF_LIMIT[options.device.type] if options.precision == "bf16" else None)
    rates = {"tflop": total / images / 1e12}
    works: dict[str, Callable[[], object]] = {"guided": step} if guided else {"backward": step.backward, "step": step}
    built = (
        Case(
            f"utilisation.{name}_{options.precision}",
            counting(work, images),
            limit=limit,
            goals=goals if name == "step" else Goals(),
            check=check,
            facts=facts,
            rates=rates,
        )
        for name, work in works.items()
    )
    return {case.name: case for case in built}


def counting(work: Callable[[], object], images: int) -> Work:
    """Return work whose items are images."""

    def act() -> int:
        work()
        return images

    return act


class GuidedStep(Step):
    """A step whose saliency routers read the clean latents."""

    def backward(self) -> tuple[Routing, ...]:
        """Compute losses and their gradients."""
        self.model.zero_grad()
        output = self.model(interpolate(self.x0, self.x1, self.t), self.t, self.condition, self.x0)
        v_target = velocity_target(self.x0, self.x1)
        capacity = HEAD_LOSSES["capacity"].function(output.routing, v_target, self.model.config.patch_size)
        (flow_matching(output.v, v_target) + CAPACITY_WEIGHT * capacity).backward()
        routing: tuple[Routing, ...] = output.routing
        return routing


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
