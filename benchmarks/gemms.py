"""The matrix products of a training step alone, at its shapes: a lower bound of the time of the step."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Options
from sharpmoe.model.flops import Product


class Gemm(NamedTuple):
    """A product (batch, m, k) x (batch, k, n), `times` times in a row, laid out as in `functional.linear`."""

    batch: int
    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """Return the FLOPs of all `times` products."""
        return 2 * self.batch * self.m * self.k * self.n * self.times


def gemms_of(products: Iterable[Product], num_experts: int) -> list[Gemm]:
    """Return forward and backward of products whose routed rows are divided equally between the experts."""
    gemms = []
    for product in products:
        batch = num_experts if product.part == "routed" else product.batch
        m = int(product.m) * product.batch // batch
        shapes = [(m, product.k, product.n), (product.n, m, product.k), (m, product.n, product.k)]
        gemms += [Gemm(batch, *shape, product.times) for shape in shapes[: 1 + product.gradients]]
    return [gemm for gemm in gemms if gemm.flops]


def bare(gemms: Iterable[Gemm], options: Options) -> Callable[[], None]:
    """Return work that runs all products in turn, on preallocated operands of each shape."""
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
