"""An optimizer step of the engine: gradient norm, clipping, AdamW, the weights of the forward, the EMA.

    python -m benchmarks.optimizer [--device cuda] [--dtype bf16] [--only TEXT] [--json FILE] [--tiny]

The reference is torch's: clip_grad_norm_, AdamW (foreach) and a foreach EMA over the parameters of the model. The limit
copies as many bytes as a step must move: per parameter 4 for the norm, 28 for AdamW, 12 for the EMA, and 8 (6 in bf16)
for the weights of the forward. One rank, ZeRO-3: nothing is sent. Gradients are given.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, main, sizes_for
from benchmarks.models import drawn_model
from sharpmoe.config import RunConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine

ZERO3 = Path(__file__).resolve().parents[1] / "configs" / "zero3.json"
_LR, _CLIP, _DECAY, _GRADIENT = 1e-4, 1.0, 0.9999, 1e-2
_BYTES = {"fp32": 4 + 28 + 12 + 8, "bf16": 4 + 28 + 12 + 6}
_RATIO = 1.5


SIZES: SizeTable[list[tuple[str, int]]] = {  # preset and depth
    "tiny": {0: [("tiny", 2)]},
    "cpu": {0: [("s", 4), ("b", 4)]},
    "cuda": {0: [("b", 4)], 22: [("b", 4), ("l", 4)]},
}


def cases(options: Options) -> Iterator[Planned]:
    for preset, depth in sizes_for(SIZES, options):
        name, fields = f"optimizer.diffmoe_{preset}_depth{depth}", {"preset": preset, "depth": depth}
        yield Planned(name, partial(_in_world, name, fields, options))


def _in_world(name: str, fields: dict[str, object], options: Options) -> Case:
    return optimizer_step(name, fields, launch.start(), options)


def run_for(fields: dict[str, object], options: Options, output: str = "none") -> RunConfig:
    """Return a run of one rank with these fields of the model."""
    return RunConfig.model_validate(
        {
            "output": output,
            "model": {"router": "diffmoe", "conditioning": "class", "num_classes": 1000} | fields,
            "data": {"shards": "none"},
            "optim": {"lr": _LR, "clip_norm": _CLIP, "ema_decay": _DECAY, "weight_decay": 0.01},
            "train": {"global_batch": 1, "micro_batch": 1, "precision": options.precision},
        }
    )


def optimizer_step(name: str, fields: dict[str, object], world: World, options: Options) -> Case:
    """Return the steps of engine and torch on the same weights and gradients."""
    torch.manual_seed(0)
    run = run_for(fields, options)
    model = drawn_model(run.model, options.device, torch.float32)
    theirs = TorchStep(model, run, options)
    ours = EngineStep(model, run, world)
    bytes_moved = _BYTES[options.precision] * ours.engine.num_parameters
    source = torch.ones(ours.engine.num_parameters, device=options.device)
    target = torch.zeros_like(source)

    def limit() -> int:
        whole, rest = divmod(bytes_moved // 2, source.nbytes)
        for _ in range(whole):
            target.copy_(source)
        target[: rest // 4].copy_(source[: rest // 4])
        return 1

    def check() -> None:
        for _ in range(2):
            ours.give_gradients()
            theirs.give_gradients()
            exact = torch.stack([p.grad.double().norm() for p in theirs.masters if p.grad is not None]).norm().item()
            assert ours() == theirs() == 1
            torch.testing.assert_close(ours.norm, exact, rtol=1e-6, atol=0)  # torch's float32 sum is 1e-4 off on CPU
        for got, expected in ((ours.weights(), theirs.masters), (ours.averages(), theirs.average)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    facts = {"parameters": ours.engine.num_parameters}
    rates = {"bytes": float(bytes_moved)}
    return Case(name, ours, theirs, limit, Goals(ratio=_RATIO), check, facts, rates)


def gradients_for(parameters: list[Tensor]) -> Iterator[Tensor]:
    """Return fixed gradients, large enough to be clipped."""
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(index)
        yield _GRADIENT * torch.randn(parameter.numel(), generator=generator).to(parameter.device)


class EngineStep:
    """Our step. A call does one step; gradients stay as `give_gradients` and clipping left them."""

    def __init__(self, model: Backbone, run: RunConfig, world: World) -> None:
        self.shapes = [p.shape for p in model.parameters()]
        self.module = model
        self.engine = Engine(model, run, resolve_ds_config(ZERO3, run, world.size), world)
        self.ema = ShardEma(self.engine, run.optim.ema_decay)
        self.norm = 0.0
        latent = torch.zeros(1, run.model.latent_channels, run.model.latent_size, run.model.latent_size)
        x, t = latent.to(world.device), torch.full((1,), 0.5, device=world.device)
        self.engine.backward(self.engine(x, t, torch.zeros(1, dtype=torch.long, device=world.device), x).v.sum())
        self._zero = self.engine._zero
        self._gradients = dict(self._zero.averaged_gradients)

    def give_gradients(self) -> None:
        """Write gradients where DeepSpeed's backward writes them."""
        order = {id(p): i for i, p in enumerate(self.module.parameters())}
        given = list(gradients_for([torch.empty(shape, device=self.ema.shards[0].device) for shape in self.shapes]))
        for group, parameters in enumerate(self._zero.fp16_groups):
            for place, parameter in zip(self._gradients[group], parameters, strict=True):
                place.copy_(given[order[id(parameter)]])

    def __call__(self) -> int:
        self._zero.averaged_gradients.update(self._gradients)
        self.norm = self.engine.step(_LR, lambda _: True).norm
        self.ema.update()
        return 1

    def weights(self) -> list[Tensor]:
        """Return the float32 weights in the order of the model's parameters."""
        whole = self.engine.full_weights(self.module)
        return [whole[name] for name, _ in self.module.named_parameters()]

    def averages(self) -> list[Tensor]:
        """Return the EMA in the order of the model's parameters."""
        whole = self.ema.full_weights(self.module)
        return [whole[name] for name, _ in self.module.named_parameters()]


class TorchStep:
    """The reference on copies of a model's parameters."""

    def __init__(self, model: nn.Module, run: RunConfig, options: Options) -> None:
        self.masters: list[Tensor] = [
            nn.Parameter(p.detach().to(options.device, options.dtype).float(), requires_grad=True)
            for p in model.parameters()
        ]
        is_half = options.dtype != torch.float32
        self.forward = [p.detach().to(options.dtype) for p in self.masters] if is_half else []
        self.average = [p.detach().clone() for p in self.masters]
        self.norm = 0.0
        self.optimizer = torch.optim.AdamW(self.masters, _LR, weight_decay=run.optim.weight_decay, foreach=True)

    def give_gradients(self) -> None:
        """Set every parameter's gradient."""
        for master, gradient in zip(self.masters, gradients_for(self.masters), strict=True):
            master.grad = gradient.view_as(master)

    @torch.no_grad()
    def __call__(self) -> int:
        self.norm = float(nn.utils.clip_grad_norm_(self.masters, _CLIP, foreach=True))
        self.optimizer.step()
        values = [p.detach() for p in self.masters]
        if self.forward:
            torch._foreach_copy_(self.forward, values)
        torch._foreach_lerp_(self.average, values, 1 - _DECAY)
        return 1


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
