"""Stacked experts: every way of computing them against a dense reference, values and gradients."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sharpmoe.moe import products
from sharpmoe.moe.experts import Experts
from sharpmoe.moe.products import RowLayout, _Equal, _grouped, _Split
from tests.moe.dense import dense_experts, stacked_weights

WIDTH, HIDDEN = 16, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}
COUNTS = {
    "uneven": [5, 1, 0, 6],
    "the last ones empty": [7, 2, 0, 0],
    "the first ones empty": [0, 0, 3, 1],
    "all to one": [0, 9, 0, 0],
    "equal": [4, 4, 4, 4],
}
# "counts": as forward chooses on this machine; "grouped": what it chooses on CUDA in bf16. grouped_mm knows no float64.
WAYS = [("counts", dtype) for dtype in TOLERANCE] + [("grouped", torch.float32), ("grouped", torch.bfloat16)]
WAYS += [("tiles", torch.bfloat16)]  # as forward chooses where a CPU has them


def experts_of(kind: str, dtype: torch.dtype) -> Experts:
    experts = Experts(4, WIDTH, HIDDEN, kind).to(dtype)
    with torch.no_grad():
        for parameter, value in zip(experts.parameters(), stacked_weights(4, WIDTH, HIDDEN, kind), strict=True):
            parameter.copy_(value)
    return experts


def apply_grouped(experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
    return experts.apply_in(rows, _grouped(counts, rows))


def rows_of(counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the weights of a loss, and the one-hot experts."""
    g = torch.Generator().manual_seed(1)
    rows, weight = (torch.randn(sum(counts), WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    return rows, weight, torch.eye(4, dtype=torch.float64).repeat_interleave(torch.tensor(counts), dim=0)


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_experts_equal_the_dense_reference(
    way: str, counts: list[int], dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "tiles":
        monkeypatch.setattr(products, "_amx_in_use", lambda: True)
    rows, weight, one_hot = rows_of(counts)
    weights = [w.requires_grad_() for w in stacked_weights(4, WIDTH, HIDDEN, kind)]
    expected = dense_experts(rows.requires_grad_(), one_hot, weights, kind)
    (expected * weight).sum().backward()

    experts = experts_of(kind, dtype)
    x = rows.detach().to(dtype).requires_grad_()
    y = apply_grouped(experts, x, torch.tensor(counts)) if way == "grouped" else experts(x, torch.tensor(counts))
    (y * weight.to(dtype)).sum().backward()
    got = [y, x.grad, *(p.grad for p in experts.parameters())]
    assert worst(got, [expected, rows.grad, *(w.grad for w in weights)]) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_one_number_for_equal_counts_is_their_list(kind: str) -> None:
    experts, rows = experts_of(kind, torch.float64), rows_of([3, 3, 3, 3])[0]
    together = experts(rows, 3)
    assert torch.equal(together, experts(rows, torch.tensor([3, 3, 3, 3])))
    torch.testing.assert_close(together, experts.apply_in(rows, _Split((3, 3, 3, 3))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [0, torch.zeros(4, dtype=torch.long), torch.tensor([5, 0, 0, 1])], ids=str)
def test_an_expert_without_rows_still_has_a_gradient(counts: Tensor | int) -> None:
    experts = experts_of("gelu", torch.float32)
    experts(torch.randn(int(torch.as_tensor(counts).sum()), WIDTH), counts).sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())
    assert experts.w1.grad[1].abs().sum() == 0


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_the_grouped_way_takes_the_gradient_of_a_plain_sum(kind: str) -> None:
    """It arrives as one number, expanded: grouped_mm's backward fails on that."""
    counts = torch.tensor([2, 0, 3, 1])
    first, second = experts_of(kind, torch.float32), experts_of(kind, torch.float32)
    rows = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    apply_grouped(first, rows, counts).sum().backward()
    second(rows, counts).sum().backward()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", [_Equal(4, 3), _Split((5, 1, 0, 6)), "grouped"], ids=str)
def test_backward_reads_the_weights_as_they_are_then(layout: RowLayout | str) -> None:
    """ZeRO-3 takes a layer's weights away after its forward and brings them back for its backward."""
    rows = rows_of([3, 3, 3, 3])[0].float()
    lies = _grouped(torch.tensor([5, 1, 0, 6]), rows) if isinstance(layout, str) else layout
    gradients = []
    for factor in (1, 2):
        experts, x = experts_of("gelu", torch.float32), rows.clone().requires_grad_()
        y = experts.apply_in(x, lies)
        for weight in (experts.w1, experts.w2):
            weight.data = factor * weight.data
        y.backward(torch.ones_like(y))
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], 4 * gradients[0], rtol=1e-6, atol=1e-6)


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.dtypes.append(out.dtype)
        return out


@pytest.mark.parametrize("counts", [3, torch.tensor([5, 1, 0, 6]), torch.tensor([3, 3, 3, 3])], ids=str)
@pytest.mark.parametrize(("tiles", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_is_multiplied_in_float32_on_a_cpu_without_tiles(
    tiles: bool, expected: torch.dtype, counts: Tensor | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_amx_in_use", lambda: tiles)
    experts, rows = experts_of("gelu", torch.bfloat16), rows_of([3, 3, 3, 3])[0].bfloat16().requires_grad_()
    with Products() as noted:
        experts(rows, counts).sum().backward()
    assert len(noted.dtypes) >= 6
    assert set(noted.dtypes) == {expected}
    assert {p.grad.dtype for p in experts.parameters()} == {rows.grad.dtype} == {torch.bfloat16}


@pytest.mark.slow
def test_bf16_experts_are_one_graph_on_a_cpu() -> None:
    """What the CPU can do is asked while they are traced."""
    experts, rows = experts_of("gelu", torch.bfloat16), rows_of([3, 3, 3, 3])[0].bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(experts.forward, backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows, 3), experts(rows, 3))


@pytest.mark.parametrize("each", [2, 129])
@pytest.mark.parametrize("inner", [256, 257, 700])
def test_rows_gradients_of_a_long_contraction(each: int, inner: int) -> None:
    """Few rows are multiplied in parts on a CPU."""
    g = torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(*shape, generator=g).double() for shape in ((3 * each, inner), (3, inner, 5)))
    expected = torch.einsum("epf,efd->epd", gradient.view(3, each, inner), weight).flatten(0, 1)
    with FlopCounterMode(display=False) as counter:
        got = _Equal(3, each).back(gradient, weight)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert counter.get_total_flops() == 2 * 3 * each * inner * 5


def test_a_widened_product_is_rounded_once() -> None:
    """To the nearest bf16 of the exact outcome, whose mantissa has 8 bits."""
    experts, rows = experts_of("gelu", torch.bfloat16), rows_of([5, 1, 0, 6])[0].bfloat16()
    layout, bias = _Split((5, 1, 0, 6), widened=True), experts.w3[:, 0, :HIDDEN].detach()
    weight, gradient = experts.w1.detach(), torch.randn(12, HIDDEN).bfloat16()
    exact = _Split((5, 1, 0, 6))
    for got, expected in (
        (layout.times(rows, weight, bias), exact.times(rows.double(), weight.double(), bias.double())),
        (layout.back(gradient, weight), exact.back(gradient.double(), weight.double())),
        (layout.outer(gradient, rows), exact.outer(gradient.double(), rows.double())),
    ):
        assert ((got.double() - expected).abs() <= expected.abs() / 2**8 + 1e-5).all()


@pytest.mark.parametrize(
    ("supported", "most", "expected"),
    [
        (True, None, True),
        (True, "AVX512_CORE_AMX", True),
        (True, "default", True),
        (True, "AVX512_CORE_FP16", False),  # what the launcher sets
        (False, None, False),
    ],
)
def test_tiles_are_those_that_onednn_may_use(
    supported: bool, most: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if most is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    rows = torch.ones(2, 3, dtype=torch.bfloat16)
    assert products._widens(rows) is not expected
    assert not products._widens(rows.float())
    assert not products._widens(rows.half())


@pytest.mark.gpu
def test_on_cuda_counts_stay_on_the_device() -> None:
    experts = experts_of("gelu", torch.bfloat16).cuda()
    rows, counts = rows_of([5, 1, 0, 6])[0].bfloat16().cuda(), torch.tensor([5, 1, 0, 6]).cuda()
    expected = experts.apply_in(rows, _Split((5, 1, 0, 6)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = experts(rows, counts)
        equal = experts(rows, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y, expected, rtol=6e-2, atol=6e-2)
    torch.testing.assert_close(equal, experts.apply_in(rows, _Split((3, 3, 3, 3))), rtol=6e-2, atol=6e-2)
