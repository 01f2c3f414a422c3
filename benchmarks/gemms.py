"""The bare matrix products of a training step, at its own shapes: what bounds the step from below."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Options
from sharpmoe.model.flops import Product


class Gemm(NamedTuple):
    """A product (batch, m, k) x (batch, k, n), `times` times in a row. It lies in memory as in `functional.linear`."""

    batch: int
    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """All of them together."""
        return 2 * self.batch * self.m * self.k * self.n * self.times


def gemms_of(products: Iterable[Product], num_experts: int) -> list[Gemm]:
    """Forward and backward of products whose routed rows are shared equally by so many experts."""
    gemms = []
    for product in products:
        batch = num_experts if product.part == "routed" else product.batch
        m = int(product.m) * product.batch // batch
        shapes = [(m, product.k, product.n), (product.n, m, product.k), (m, product.n, product.k)]
        gemms += [Gemm(batch, *shape, product.times) for shape in shapes[: 1 + product.gradients]]
    return [gemm for gemm in gemms if gemm.flops]


def bare(gemms: Iterable[Gemm], options: Options) -> Callable[[], None]:
    """All products one after the other, on operands that are there; each shape has its own."""
    calls = [(gemm.times, *_operands(gemm, options)) for gemm in gemms]

    def run() -> None:
        for times, left, right, out in calls:
            for _ in range(times):
                torch.bmm(left, right, out=out)

    return run


def _operands(gemm: Gemm, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    def full(*shape: int) -> Tensor:
        return torch.randn(gemm.batch, *shape, device=options.device).to(options.dtype)

    return full(gemm.m, gemm.k), full(gemm.n, gemm.k).transpose(1, 2), full(gemm.m, gemm.n)
