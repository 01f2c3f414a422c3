"""What one layer does, counted: FLOPs, what it keeps for backward, what it makes, waits of the host, rows; its bits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import SavedBytes
from sharpmoe.config import ModelConfig
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import CallMode, Routing

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 2, 32, 16, 64, 16
EQUAL, VARYING = ("ec", "diffmoe"), ("tc", "race", "dit_moe")


def layer_of(router: str, **fields: object) -> MoELayer:
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "num_heads": 2, "num_experts": EXPERTS}
    plain_race = {"gate": "linear", "layer_heads": False}  # without the head that only its loss reads
    layer = MoELayer(ModelConfig(router=router, **(sizes | plain_race | fields))).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


class Run:
    """Forward and backward with everything that has a gradient."""

    def __init__(self, layer: MoELayer, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(1)
        shape = (IMAGES, TOKENS, WIDTH)
        self.layer = layer
        self.h, self.x0_prev, self.dy = (torch.randn(shape, generator=g).to(device) for _ in range(3))
        self.h.requires_grad_()
        self.x0_prev.requires_grad_()

    def forward(self, routing_map: Tensor | None = None) -> tuple[Tensor, Routing]:
        maps = None if routing_map is None else (routing_map,)
        return self.layer(self.h, self.x0_prev, None, CallMode(routing_maps=maps))

    def __call__(self, routing_map: Tensor | None = None) -> list[Tensor]:
        self.layer.zero_grad()
        self.h.grad = self.x0_prev.grad = None
        y, record = self.forward(routing_map)
        loss = (y * self.dy).sum()
        if record.capacity_logits is not None:
            loss = loss + record.capacity_logits.square().sum()
        loss.backward()
        return [y, self.h.grad, self.x0_prev.grad, *(p.grad for p in self.layer.parameters())]


@pytest.mark.parametrize("router", ["ec", "diffmoe", "tc", "race"])
def test_no_matrix_product_is_wasted(router: str) -> None:
    layer = layer_of(router)
    run = Run(layer)
    rows = int(run.forward()[1].routing_map.sum())
    tokens = IMAGES * TOKENS
    gate, small, square = tokens * WIDTH * EXPERTS, tokens * WIDTH * EXPERTS, tokens * WIDTH * WIDTH
    products = 3 * 2 * rows * WIDTH * HIDDEN  # forward, and two products backward, of both matrices
    products += 3 * gate + 3 * (square + small)  # gate, saliency router
    if router == "diffmoe":
        products += 2 * square + 3 * small  # the predictor's tokens have no gradient
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * products


@pytest.mark.parametrize("router", ["ec", "diffmoe", "tc"])
def test_what_is_kept_for_backward_grows_with_rows_not_with_experts_times_tokens(router: str) -> None:
    run = Run(layer_of(router))
    tokens = IMAGES * TOKENS
    without = [*run.layer.parameters(), run.h, run.x0_prev]
    with SavedBytes(without).watch() as kept:
        held = run.forward()
    rows = int(held[1].routing_map.sum())
    experts = rows * (WIDTH + HIDDEN + HIDDEN + WIDTH)  # rows in, before and after the activation, answers
    routers = tokens * 2 * WIDTH * (2 if router == "diffmoe" else 1)  # hidden layers before and after SiLU
    indices = rows * 5 * 2 + tokens * 2  # int64: expert and token (and again, by token), row; starts
    gates = rows
    small = tokens * EXPERTS  # logits, scores, the map
    rest = kept.peak / 4 - experts - routers - gates
    assert 0 <= rest <= indices + 4 * small
    assert kept.peak / 4 < EXPERTS * tokens * WIDTH + experts  # no room for the buffer of the published form


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("router", [*EQUAL, *VARYING])
def test_nothing_as_large_as_experts_times_tokens_is_made(router: str) -> None:
    run = Run(layer_of(router))
    with Largest() as largest:
        outcome = run()
    rows = int(run.forward()[1].routing_map.sum())
    assert largest.numel <= max(rows * HIDDEN, *(tensor.numel() for tensor in outcome))
    assert rows * HIDDEN < EXPERTS * IMAGES * TOKENS * WIDTH


class Waits(TorchDispatchMode):
    """Operators whose result the host has to wait for, or whose shape depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._opname
        masks = name.startswith("index") and any(
            leaf.dtype == torch.bool for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor)
        )
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router", ["tc", "dit_moe", "dsmoe", "race"])
def test_a_fixed_total_leaves_counts_to_be_read_only_where_the_split_loop_needs_them(router: str) -> None:
    """On CUDA in bf16 the grouped product takes them from the device."""
    run = Run(layer_of(router))
    with Waits() as waits:
        run()
    assert waits.seen == []  # the loop's own read is a list, which the CPU makes without an operator


@pytest.mark.parametrize("router", EQUAL)
def test_equal_counts_never_make_the_host_wait(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(layer_of(router))
    replayed = run.forward()[1].routing_map
    monkeypatch.setattr(Tensor, "tolist", None)  # on the CPU it reads memory without any operator
    with Waits() as waits:
        run()
        run(replayed)
    assert waits.seen == []


def test_a_wait_would_be_seen() -> None:
    run, x = Run(layer_of("race").eval()), torch.arange(3.0)
    for act in (run, lambda: x[x > 1], lambda: x.sum().item(), lambda: x.nonzero()):
        with Waits() as waits:
            act()
        assert waits.seen


@pytest.mark.parametrize("router", [*EQUAL, *VARYING])
def test_experts_compute_the_chosen_rows_and_no_other(router: str) -> None:
    layer = layer_of(router)
    seen: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    record = Run(layer).forward()[1]
    assert seen == [int(record.routing_map.sum())]


@pytest.mark.parametrize("router", [*EQUAL, *VARYING])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_bits_every_time(router: str, device: str) -> None:
    run = Run(layer_of(router, capacity=2.0, top_k=2).to(device), device)
    first = [tensor.clone() for tensor in run()]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("router", ["ec", "tc"])
def test_experts_without_gradient_do_not_compute_one(router: str) -> None:
    run = Run(layer_of(router))
    expected = run()
    flops: dict[bool, int] = {}
    for frozen in (False, True):
        run.layer.experts.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            got = run()
        flops[frozen] = counter.get_total_flops()
    assert torch.equal(got[1], expected[1])
    rows = int(run.forward()[1].routing_map.sum())
    assert flops[False] - flops[True] == 2 * 2 * rows * WIDTH * HIDDEN
