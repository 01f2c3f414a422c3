"""Limits of the machine: matrix products at the shapes of a layer, and copying.

    python -m benchmarks.ceilings [--device cpu|cuda] [--dtype fp32|bf16] [--only TEXT] [--json FILE] [--tiny]

`gemm` is one dense product, the first of an MLP, tokens x D by D x 4D. `experts` are the same FLOPs as one product per
expert, on tokens / E rows each; the dense product is their limit, and no form of the layer can recover the difference.
Rates are TFLOP/s, and GB/s read and written. A copy reads and writes tensors much larger than the caches.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gemms import Gemm, bare
from benchmarks.harness import Case, Options, Planned, SizeTable, Work, main, sizes_for
from sharpmoe.config import SIZES

SHAPES: SizeTable[list[tuple[str, int, int]]] = {  # preset, experts, tokens
    "tiny": {0: [("tiny", 4, 256)]},
    "cpu": {0: [("s", 16, 2048), ("s", 8, 2048), ("s", 16, 8192), ("b", 16, 2048), ("l", 16, 2048)]},
    "cuda": {0: [("s", 16, 8192), ("b", 16, 8192), ("l", 16, 8192), ("l", 16, 16384)]},
}
COPIED: SizeTable[int] = {"tiny": {0: 2**20}, "cpu": {0: 2**28}, "cuda": {0: 2**30, 22: 2**32}}  # bytes


def cases(options: Options) -> Iterator[Planned]:
    shapes = sizes_for(SHAPES, options)
    named = {planned.name: planned for shape in shapes for planned in products(*shape, options)}
    yield from named.values()  # shapes that differ in the number of experts share a dense product
    size = sizes_for(COPIED, options)
    yield Planned(_copy_name(size), partial(copying, size, options))


def products(preset: str, num_experts: int, tokens: int, options: Options) -> Iterator[Planned]:
    """Yield the dense product, and the same FLOPs as products of experts."""
    width = SIZES[preset]["width"]
    dense = Gemm(1, tokens, width, 4 * width, 1)
    experts = Gemm(num_experts, tokens // num_experts, width, 4 * width, 1)
    rate = {"tflop": dense.flops / 1e12}
    name = f"ceilings.gemm_{preset}_{tokens}"
    yield Planned(name, lambda: Case(name, _work(dense, options), rates=rate))

    def of_experts() -> Case:
        return Case(each, _work(experts, options), limit=_work(dense, options), rates=rate)

    each = f"ceilings.experts_{preset}_e{num_experts}_{tokens}"
    yield Planned(each, of_experts)


def _copy_name(size: int) -> str:
    return f"ceilings.copy_{size / 2**20:g}mib"


def copying(size: int, options: Options) -> Case:
    """Copy `size` bytes."""
    source = torch.ones(size // options.dtype.itemsize, dtype=options.dtype, device=options.device)
    target = torch.empty_like(source)

    def copy() -> int:
        target.copy_(source)
        return 1

    return Case(_copy_name(size), copy, rates={"gb": 2 * size / 1e9})


def _work(gemm: Gemm, options: Options) -> Work:
    run = bare([gemm], options)

    def act() -> int:
        run()
        return 1

    return act


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
