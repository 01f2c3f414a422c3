"""One MoE layer, forward and backward, against its published form and against a dense MLP of equal FLOPs.

    python -m benchmarks.moe_layer [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--tiny]

Both layers use and train the same float32 router, and DiffMoE its capacity predictor and thresholds.
`benchmarks/published.py` describes the published form, also in bf16. The limit is one MLP whose matrix products have as
many FLOPs as all products of the layer, including router and predictor, in the given precision. `routed` is the
fraction of those FLOPs in experts. Names end in the size (width of DiT-S, B, L), the number of experts and the tokens
of a call; published models are S with 16 experts (KwaiVGI/DiffMoE), B and L with 8 (ali-vilab/ProMoE) and with 16.

`bound` cases run only the layer's matrix products and activations in place of ours. They show how much faster than the
published layer, and how close to the dense one, a layer of these products could be at most.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gemms import bare, gemms_of
from benchmarks.harness import Case, Goals, Options, Planned, SizeTable, Work, main, sizes_for
from benchmarks.models import draw_parameters
from benchmarks.published import (
    THRESHOLD_DECAY,
    OneHotExpertChoice,
    PublishedDiffMoE,
    assert_close,
    gradients,
    one_hot_places,
    stacked,
)
from sharpmoe.config import ModelConfig
from sharpmoe.families import tokens_per_expert
from sharpmoe.model.flops import Product
from sharpmoe.moe.dispatch import Assignment, LocalDispatcher, RowCounts
from sharpmoe.moe.experts import Mlp
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import Routing
from sharpmoe.moe.selection import RULES, RuleInput
from sharpmoe.moe.thresholds import threshold_candidates, update_thresholds

TOKENS = 256  # per image
TOLERANCE = {"fp32": 2e-5, "bf16": 4e-2}  # of outputs and gradients, against the largest magnitude


class Size(NamedTuple):
    """A layer and a call."""

    preset: str
    num_experts: int
    images: int

    def config(self, router: str) -> ModelConfig:
        """Return the configuration of the layer's model."""
        fields = {"preset": self.preset, "num_experts": self.num_experts, "router": router, "saliency_router": False}
        return ModelConfig.model_validate(fields)

    def __str__(self) -> str:
        return f"{self.preset}_e{self.num_experts}_{self.images * TOKENS}"


DIFFMOE: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny", 4, 1)]},
    "cpu": {
        0: [
            *(Size("s", 16, images) for images in (8, 32)),
            *(Size("b", experts, images) for experts in (8, 16) for images in (8, 32)),
            *(Size("l", experts, 8) for experts in (8, 16)),
        ]
    },
    "cuda": {
        0: [Size("s", 16, 32), Size("b", 8, 32), Size("l", 8, 16)],
        22: [Size("s", 16, 32), Size("b", 8, 32), Size("l", 8, 32)],
        36: [Size("s", 16, 32), Size("b", 8, 32), Size("l", 8, 32), Size("l", 16, 64)],
    },
}
EXPERT_CHOICE: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny", 4, 1)]},
    "cpu": {0: [Size("s", 8, 8), Size("b", 8, 8)]},
    "cuda": {0: [Size("l", 8, 8)], 22: [Size("l", 8, 32)]},
}
RATIO = {"cpu": {"fp32": 1.15, "bf16": 1.4}, "cuda": {"fp32": 1.3, "bf16": 1.3}}
OF_LIMIT = {"cpu": 0.90, "cuda": 0.85}
DISPATCH = 4.0


def cases(options: Options) -> Iterator[Planned]:
    tables = {"diffmoe": DIFFMOE, "bound": DIFFMOE, "ec": EXPERT_CHOICE, "dispatch_ec": EXPERT_CHOICE}
    builds = {"diffmoe": diffmoe, "bound": bound, "ec": expert_choice_layer, "dispatch_ec": dispatch}
    for kind, table in tables.items():
        for size in sizes_for(table, options):
            yield Planned(f"moe_layer.{kind}_{size}", partial(builds[kind], size, options))


def diffmoe(size: Size, options: Options) -> Case:
    """Return DiffMoE in training: every expert takes the same number of tokens."""
    layer = make_layer(size.config("diffmoe"), options)
    published = PublishedDiffMoE(layer)
    goals = Goals(RATIO[options.device.type][options.precision], OF_LIMIT[options.device.type])
    return _against(f"moe_layer.diffmoe_{size}", layer, published, size, options, goals)


def expert_choice_layer(size: Size, options: Options) -> Case:
    """Return expert choice: the whole layer."""
    layer = make_layer(size.config("ec"), options)
    goals = Goals(None, OF_LIMIT[options.device.type])
    return _against(f"moe_layer.ec_{size}", layer, OneHotExpertChoice(layer), size, options, goals)


def bound(size: Size, options: Options) -> Case:
    """Return the products that a layer of DiffMoE needs at least, in place of ours."""
    layer = make_layer(size.config("diffmoe"), options)
    case = _against(f"moe_layer.bound_{size}", layer, PublishedDiffMoE(layer), size, options, Goals())
    alone = Bare(layer.config, size, options)

    def check() -> None:
        assert flops(alone) == round(case.facts["gflop"] * 1e9)

    return case._replace(ours=alone, check=check)


class Bare:
    """Products and activations of a DiffMoE layer, forward and backward, on preallocated operands."""

    def __init__(self, config: ModelConfig, size: Size, options: Options) -> None:
        tokens = size.images * TOKENS
        width, inner, experts = config.width, config.expert_width, config.num_experts
        rows = experts * tokens_per_expert(tokens, experts, config.capacity)
        done = [
            Product("routed", 1, rows, width, inner),
            Product("routed", 1, rows, inner, width),
            Product("router", 1, tokens, width, experts),
            Product("router", 1, tokens, width, width, gradients=1),
            Product("router", 1, tokens, width, experts),
        ]
        routed, router = ([each for each in done if each.part == part] for part in ("routed", "router"))
        self.products = bare(gemms_of(routed, experts), options)
        in_float32 = options._replace(dtype=torch.promote_types(options.dtype, torch.float32))
        self.router = bare(gemms_of(router, experts), in_float32)
        self.inner, self.d_inner = torch.randn(2, rows, inner, device=options.device, dtype=options.dtype)

    def __call__(self) -> int:
        self.products()
        self.router()
        functional.gelu(self.inner, approximate="tanh")
        torch.ops.aten.gelu_backward(self.d_inner, self.inner, approximate="tanh")
        return 1


def make_layer(config: ModelConfig, options: Options) -> MoELayer:
    """Return a layer with random weights in training mode."""
    layer = MoELayer(config).train().to(options.device, options.dtype)
    draw_parameters(layer, options.dtype)
    return layer


class Pass:
    """Forward and backward of a layer on fixed tokens (B, N, D) and a fixed gradient.

    DiffMoE trains its capacity predictor and updates its thresholds, ours after the forward.
    """

    def __init__(self, layer: nn.Module, images: int, config: ModelConfig, options: Options) -> None:
        g = torch.Generator().manual_seed(1)
        shape = (images, TOKENS, config.width)
        h, dy = (torch.randn(shape, generator=g).to(options.device, options.dtype) for _ in range(2))
        d_capacity = torch.randn((*shape[:2], config.num_experts), generator=g).to(options.device)
        self.layer, self.h, self.dy, self.d_capacity = layer, h.requires_grad_(), dy, d_capacity

    def __call__(self) -> int:
        self.run()
        return 1

    def run(self) -> Tensor:
        """The same, returning y."""
        self.layer.zero_grad()
        self.h.grad = None
        out = self.layer(self.h)
        y, record = out if isinstance(out, tuple) else (out, None)
        finish(self.layer, y, record, self.dy, self.d_capacity)
        return y

    def outcome(self) -> dict[str, Tensor]:
        """Return output and gradients under our names, and thresholds after one update from zero."""
        for buffer in self.layer.buffers():
            buffer.zero_()
        y = self.run()
        assert self.h.grad is not None
        thresholds = {name: buffer.clone() for name, buffer in self.layer.named_buffers()}
        return {"y": y.detach(), "h": self.h.grad, **thresholds, **stacked(gradients(self.layer))}


def finish(layer: nn.Module, y: Tensor, record: Routing | None, dy: Tensor, d_capacity: Tensor) -> None:
    """Run the backward of y and of capacity logits, if any; a layer of ours also updates its thresholds."""
    if record is None or record.capacity_logits is None:
        y.backward(dy)
        return
    if isinstance(layer, MoELayer):
        candidates = threshold_candidates([record], layer.config)
        update_thresholds([layer.expert_threshold], candidates, THRESHOLD_DECAY)
    torch.autograd.backward([y, record.capacity_logits], [dy, d_capacity.to(record.capacity_logits.dtype)])


def flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the layer's matrix products, grouped ones (bf16 on CUDA) included."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops}) as counter:
        work()
    return int(counter.get_total_flops())


def _grouped_flops(left: Sequence[int], right: Sequence[int], *rest: object, **more: object) -> int:
    """FLOPs of a grouped product whose groups fill the rows: rows (P, K) x weights (E, K, N), or (M, P) x (P, N)."""
    return 2 * int(left[0]) * int(left[1]) * int(right[-1])


def dense_hidden(total: float, tokens: int, width: int) -> int:
    """Return the hidden width of an MLP whose forward and backward on the tokens have this many FLOPs."""
    return round(total / (12 * tokens * width))


def _against(name: str, layer: MoELayer, reference: nn.Module, size: Size, options: Options, goals: Goals) -> Case:
    config = layer.config
    ours, theirs = (Pass(module, size.images, config, options) for module in (layer, reference))
    total, tokens = flops(ours), size.images * TOKENS
    mlp = Mlp(config.width, dense_hidden(total, tokens, config.width)).to(options.device, options.dtype)
    rows = config.num_experts * tokens_per_expert(tokens, config.num_experts, config.capacity)
    routed = 12 * rows * config.width * config.expert_width / total

    def check() -> None:
        assert_close(ours.outcome(), theirs.outcome(), TOLERANCE[options.precision])

    facts = {"gflop": total / 1e9, "routed": routed}
    return Case(name, ours, theirs, Pass(mlp, size.images, config, options), goals, check, facts)


def dispatch(size: Size, options: Options) -> Case:
    """Return dispatch and combine of expert choice, with identity experts, against products with one-hot matrices."""
    config = size.config("ec")
    g = torch.Generator().manual_seed(1)
    shape = (size.images, TOKENS, config.width)
    x, dy = (torch.randn(shape, generator=g).to(options.device, options.dtype) for _ in range(2))
    scores = torch.randn((*shape[:2], config.num_experts), generator=g).softmax(-1).to(options.device)
    leaves = [x.requires_grad_(), scores.requires_grad_()]
    count = size.images * tokens_per_expert(TOKENS, config.num_experts, config.capacity)

    dispatcher = LocalDispatcher()

    def ours() -> tuple[Tensor, ...]:
        chosen = RULES["ec"].train(RuleInput(scores.detach()), config).flatten(0, 1)
        assignment = Assignment(chosen, scores.flatten(0, 1), RowCounts(per_expert=count))
        rows, _, ticket = dispatcher.dispatch(x.flatten(0, 1), assignment)
        y = dispatcher.combine(rows, ticket).view_as(x)
        return y, *torch.autograd.grad(y, leaves, dy)

    def one_hot() -> tuple[Tensor, ...]:
        gates, places = one_hot_places(scores, config.capacity, x.dtype)
        y = torch.einsum("becn,bec,ebcd->bnd", places, gates, torch.einsum("becn,bnd->ebcd", places, x))
        return y, *torch.autograd.grad(y, leaves, dy)

    def check() -> None:
        names = ("y", "x", "scores")
        got, expected = (dict(zip(names, work(), strict=True)) for work in (ours, one_hot))
        assert_close(got, expected, TOLERANCE[options.precision])

    return Case(f"moe_layer.dispatch_ec_{size}", _once(ours), _once(one_hot), None, Goals(DISPATCH), check)


def _once(work: Callable[[], object]) -> Work:
    def act() -> int:
        work()
        return 1

    return act


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
