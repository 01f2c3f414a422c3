"""Attention, products of experts and routing on a device against the same in float64 or in a loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.step_profile import float32_products
from sharpmoe.model.dit import _Attention
from sharpmoe.model.embed import CrossAttention, attention_bias
from sharpmoe.moe import products
from tests.gpu.place import DEVICES
from tests.moe.test_counters import Run, layer_of
from tests.toys import toy_config

BACKENDS = {
    "cpu": [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION],
    "cuda": [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
WIDTH, TOKENS, TEXT = 64, 192, 7
COUNTS = [0, 1, 7, 63, 64, 65, 0]
BF16 = 3e-2  # of values, relative to the largest
FLIPPED = 0.01  # share of (token, expert) choices that may be others in another precision: near-ties of random scores


def attention_of(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    torch.manual_seed(0)
    if kind == "self":
        return _Attention(toy_config(width=WIDTH)), lambda module, x: module(x)
    text, mask = torch.randn(2, TEXT, WIDTH), torch.ones(2, TEXT, dtype=torch.bool)
    mask[0, 3:] = False  # a short caption
    module = CrossAttention(WIDTH, 2)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        like = next(module.parameters())
        return module(x, text.to(like), attention_bias(mask.to(like.device), like.dtype))

    return module, call


def outcome(module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = call(module, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    y.backward(dy.to(y))
    return [each.detach().double().cpu() for each in (y, x.grad, *(p.grad for p in module.parameters()))]


@pytest.mark.parametrize("kind", ["self", "masked cross"])
@pytest.mark.parametrize("device", DEVICES)
def test_backends_of_attention_agree(device: str, kind: str) -> None:
    """Those that take the shape: flash attention takes no mask on CUDA. One besides the plain products does."""
    module, call = attention_of(kind)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    module, x = module.to(dtype), torch.randn(2, TOKENS, WIDTH).to(dtype)
    expected = outcome(module.double(), call, x.double())
    tolerance = BF16 if device == "cuda" else 1e-5
    there = module.to(device, dtype)
    ran = []
    for backend in BACKENDS[device]:
        with sdpa_kernel(backend):
            try:
                got = outcome(there, call, x.to(device, dtype))
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                continue
        ran.append(backend)
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3), (backend, number)
    assert SDPBackend.MATH in ran
    assert len(ran) >= 2


@pytest.mark.parametrize("device", DEVICES)
def test_the_grouped_product_equals_a_loop(device: str) -> None:
    """Groups around the tile of 64 rows, an empty one first and last; forward and all gradients."""
    g = torch.Generator().manual_seed(0)
    num, rows = len(COUNTS), sum(COUNTS)
    x = torch.randn(rows, 64, generator=g)
    weight, bias = torch.randn(num, 32, 64, generator=g) / 8, torch.randn(num, 32, generator=g)
    dy = torch.randn(rows, 32, generator=g)
    leaves = [leaf.to(device, torch.bfloat16).requires_grad_() for leaf in (x, weight, bias)]
    y = products.product(*leaves, products._grouped(torch.tensor(COUNTS, device=device), leaves[0]))
    got = [y, *torch.autograd.grad(y, leaves, dy.to(y))]
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    loop = [part @ w.T + b for part, w, b in zip(exact[0].split(COUNTS), exact[1], exact[2], strict=True)]
    expected = [torch.cat(loop), *torch.autograd.grad(torch.cat(loop), exact, dy.bfloat16().double())]
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a.double().cpu() - b).abs().max() <= BF16 * b.abs().max()
    empty = [index for index, count in enumerate(COUNTS) if not count]
    assert not got[2][empty].any()  # the gradient of an expert without rows is zero, not what the memory held
    assert not got[3][empty].any()


@pytest.mark.parametrize("router", ["diffmoe", "ec", "tc"])
@pytest.mark.parametrize("device", DEVICES)
def test_few_choices_flip_in_tensorfloat32(device: str, router: str, record_property: Callable[..., None]) -> None:
    """How many is a figure of the device; where there is no TensorFloat-32 none does."""
    layer = layer_of(router, width=256, num_heads=4, top_k=2).to(device)
    run = Run(layer, device)
    g = torch.Generator().manual_seed(2)
    run.h, run.x0_prev = (torch.randn(8, 256, 256, generator=g).to(device) for _ in range(2))
    maps = []
    for precision in ("highest", "high"):
        with float32_products(precision), torch.no_grad():
            maps.append(run.forward()[1].routing_map)
    flipped = float((maps[0] != maps[1]).sum() / maps[0].sum())
    record_property("flipped", flipped)
    print(f"{router} on {device}: {flipped:.2e} of the choices")
    assert flipped <= FLIPPED


@pytest.mark.parametrize("router", ["diffmoe", "ec", "tc", "race"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_chooses_as_on_the_cpu(device: str, router: str) -> None:
    """The same bits in every run, and the CPU's choices but for near-ties."""
    expected = Run(layer_of(router, capacity=2.0, top_k=2)).forward()[1].routing_map
    run = Run(layer_of(router, capacity=2.0, top_k=2).to(device), device)
    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    chosen = run.forward()[1].routing_map.cpu()
    assert (chosen != expected).sum() <= FLIPPED * expected.sum()
