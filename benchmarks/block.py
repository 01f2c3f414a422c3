"""One block of DiffMoE, forward and backward: attention, modulation and MoE layer, in its published form and in ours.

    python -m benchmarks.block [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--check] [--tiny]

The limit is a dense block whose matrix products have as many FLOPs: its MLP is wider by the cost of router and
predictor.
"""

import copy
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, main, sizes_for
from benchmarks.models import draw_parameters
from benchmarks.moe_layer import TOKENS, TOLERANCE, Size, finish, flops
from benchmarks.published import PublishedDiffMoE, assert_close, gradients, stacked
from sharpmoe.config import ModelConfig
from sharpmoe.model.dit import Block, Context

SIZES: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny", 4, 1)]},
    "cpu": {0: [Size("s", 16, 8), Size("b", 16, 8)]},
    "cuda": {0: [Size("b", 8, 32), Size("l", 8, 16)], 36: [Size("b", 8, 32), Size("l", 8, 64)]},
}


def cases(options: Options) -> Iterator[Planned]:
    for size in sizes_for(SIZES, options):
        yield Planned(_name(size), partial(block, size, options))


def _name(size: Size) -> str:
    return f"block.diffmoe_{size}"


def block(size: Size, options: Options) -> Case:
    """Return the case of one training block."""
    config = ModelConfig.model_validate(size.config("diffmoe").model_dump() | {"conditioning": "class"})
    module = make_block(config, 1, options)
    published = copy.deepcopy(module)
    assert module.moe is not None
    published.moe = PublishedDiffMoE(module.moe)  # type: ignore[assignment]
    ours, theirs = (Pass(each, size.images, config, options) for each in (module, published))
    total, per_width = flops(ours), 12 * size.images * TOKENS * config.width
    narrow = Pass(make_block(_dense(config, config.width), 0, options), size.images, config, options)
    hidden = config.width + round((total - flops(narrow)) / per_width)
    dense = Pass(make_block(_dense(config, hidden), 0, options), size.images, config, options)

    def check() -> None:
        assert_close(ours.outcome(), theirs.outcome(), TOLERANCE[options.precision])

    return Case(_name(size), ours, theirs, dense, Goals(), check, {"gflop": total / 1e9})


def _dense(config: ModelConfig, hidden: int) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | {"router": "dense", "mlp_ratio": hidden / config.width})


def make_block(config: ModelConfig, index: int, options: Options) -> Block:
    """Return a block with random weights in training mode; blocks with odd index are MoE."""
    made = Block(config, index).train().to(options.device, options.dtype)
    draw_parameters(made, options.dtype)
    return made


class Pass:
    """Forward and backward on fixed tokens (B, N, D) and a fixed gradient."""

    def __init__(self, module: Block, images: int, config: ModelConfig, options: Options) -> None:
        g = torch.Generator().manual_seed(1)
        shape = (images, TOKENS, config.width)
        x, dy = (torch.randn(shape, generator=g).to(options.device, options.dtype) for _ in range(2))
        c = torch.randn((images, config.width), generator=g).to(options.device, options.dtype)
        d_capacity = torch.randn((*shape[:2], config.num_experts), generator=g).to(options.device)
        self.module, self.x, self.dy, self.d_capacity = module, x.requires_grad_(), dy, d_capacity
        self.context = Context(c.requires_grad_())

    def __call__(self) -> int:
        self.run()
        return 1

    def run(self) -> Tensor:
        """Run forward and backward once and return the tokens."""
        self.module.zero_grad()
        self.x.grad = self.context.c.grad = None
        y, record = self.module(self.x, self.context)
        finish(self.module.moe or self.module, y, record, self.dy, self.d_capacity)
        return y

    def outcome(self) -> dict[str, Tensor]:
        """Return output and gradients under our names."""
        y = self.run()
        assert self.x.grad is not None
        assert self.context.c.grad is not None
        return {"y": y.detach(), "x": self.x.grad, "c": self.context.c.grad, **stacked(gradients(self.module))}


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
