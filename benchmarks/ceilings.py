"""Limits of the machine: matrix products at the shapes of a layer, and copying.

    python -m benchmarks.ceilings [--device cpu|cuda] [--dtype fp32|bf16] [--json FILE]

`gemm` is one dense product, the first of an MLP, tokens x D by D x 4D. `experts` are the same FLOPs as one product per
expert, on tokens / E rows each; the dense product is their limit, and no form of the layer can recover the difference.
Rates are TFLOP/s, and GB/s read and written. A copy reads and writes tensors much larger than the caches.
"""

import sys
from collections.abc import Iterator

import torch

from benchmarks.gemms import Gemm, bare
from benchmarks.harness import Case, Options, Work, main
from sharpmoe.config import SIZES

SHAPES = {  # preset, experts, tokens
    "cpu": [("s", 16, 2048), ("s", 8, 2048), ("s", 16, 8192), ("b", 16, 2048), ("l", 16, 2048)],
    "cuda": [("s", 16, 8192), ("b", 16, 8192), ("l", 16, 8192), ("l", 16, 16384)],
}
COPIED = {"cpu": 2**28, "cuda": 2**32}  # bytes


def cases(options: Options) -> Iterator[Case]:
    for preset, num_experts, tokens in SHAPES[options.device.type]:
        yield from products(preset, num_experts, tokens, options)
    yield copying(COPIED[options.device.type], options)


def products(preset: str, num_experts: int, tokens: int, options: Options) -> Iterator[Case]:
    """Yield the dense product, and the same FLOPs as products of experts."""
    width = SIZES[preset]["width"]
    dense = Gemm(1, tokens, width, 4 * width, 1)
    experts = Gemm(num_experts, tokens // num_experts, width, 4 * width, 1)
    rate = {"tflop": dense.flops / 1e12}
    yield Case(f"ceilings.gemm_{preset}_{tokens}", _work(dense, options), rates=rate)
    limit, ours = _work(dense, options), _work(experts, options)
    yield Case(f"ceilings.experts_{preset}_e{num_experts}_{tokens}", ours, limit=limit, rates=rate)


def copying(size: int, options: Options) -> Case:
    """Copy `size` bytes."""
    source = torch.ones(size // options.dtype.itemsize, dtype=options.dtype, device=options.device)
    target = torch.empty_like(source)

    def copy() -> int:
        target.copy_(source)
        return 1

    return Case(f"ceilings.copy_{size / 2**20:g}mib", copy, rates={"gb": 2 * size / 1e9})


def _work(gemm: Gemm, options: Options) -> Work:
    run = bare([gemm], options)

    def act() -> int:
        run()
        return 1

    return act


if __name__ == "__main__":
    sys.exit(main(cases, __doc__.splitlines()[0]))
