"""What compiling blocks gains: python -m benchmarks.gpu_check.compiled_blocks --work training ... --facts FILE.

A rollout step of DiffMoE with saliency routers (forward, losses, backward), or a call of the model as sampling makes
it, uncompiled and with compiled blocks: times, their ratio, how long compiling took, and how far the results are apart.
On a GPU also with Inductor's combo kernels, which launch independent kernels as one. On a CPU the backend is aot_eager,
which needs no compiler and gains nothing: it shows that the check runs. On a GPU sampling is also timed with each call
of an expert-choice model as one CUDA graph.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from benchmarks.gpu_check.environment import part_parser
from benchmarks.gpu_check.facts import Facts
from benchmarks.gpu_check.step_profile import attempted, median_seconds
from benchmarks.harness import Options, SizeTable, sizes_for
from benchmarks.rollout import Size, make_model, make_rollout
from benchmarks.sampling import set_thresholds
from sharpmoe.devices import wait_for
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.captured import capture_calls
from sharpmoe.model.compiled import compile_blocks

Work = Callable[[], Tensor]

_SIZES: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny_2", {"preset": "tiny", "depth": 2, "num_experts": 4, "latent_size": 8}, 2)]},
    "cuda": {
        0: [Size("s_16", {"preset": "s", "num_experts": 8}, 16)],
        22: [Size("s_32", {"preset": "s", "num_experts": 8}, 32)],
        36: [Size("s_32", {"preset": "s", "num_experts": 8}, 32), Size("l_8", {"preset": "l", "num_experts": 8}, 8)],
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--work", choices=tuple(_WORKS), required=True)
    given = parser.parse_args(argv)
    facts, device = Facts(given.facts), torch.device(given.device)
    options = Options(device, torch.bfloat16, "bf16", tiny=device.type == "cpu")
    for size in sizes_for(_SIZES, options):
        for combined in (False, True) if device.type == "cuda" else (False,):
            found = attempted(_compared, given.work, size, options, combined)
            facts.tell(fact="compiled", work=given.work, case=size.name, combo_kernels=combined, **found)
        if given.work == "sampling":
            facts.tell(fact="captured", case=size.name, **attempted(_captured, size, options))


def _training(model: Backbone, size: Size) -> Work:
    rollout = make_rollout(model, size, 1)
    return lambda: rollout()


def _sampling(model: Backbone, size: Size) -> Work:
    set_thresholds(model.eval(), next(model.parameters()).device)
    return _call(model, size)


def _call(model: Backbone, size: Size) -> Work:
    item = make_rollout(model, size, 1).item
    dtype = next(model.parameters()).dtype
    x, t = item.x0.to(dtype), item.times[0].to(dtype)

    @torch.no_grad()
    def call() -> Tensor:
        v: Tensor = model(x, t, item.condition, x).v
        return v

    return call


_WORKS: dict[str, Callable[[Backbone, Size], Work]] = {"training": _training, "sampling": _sampling}


def _compared(name: str, size: Size, options: Options, combined: bool) -> dict[str, object]:
    device, backend = options.device, "inductor" if options.device.type == "cuda" else "aot_eager"
    model = make_model(size, device, options.dtype)
    with torch.no_grad():
        work = _WORKS[name](model, size)
    before = work().detach().double()
    eager = median_seconds(work, device)
    with inductor_config.patch(combo_kernels=combined):
        torch._dynamo.reset()
        compile_blocks(model, backend=backend)
        began = time.perf_counter()
        after = work().detach().double()
        wait_for(device)
        compiling = time.perf_counter() - began
        seconds = median_seconds(work, device)
    return {
        "backend": backend,
        "eager_ms": 1e3 * eager,
        "compiled_ms": 1e3 * seconds,
        "eager_over_compiled": eager / seconds,
        "compiling_seconds": compiling,
        "distance": float((after - before).norm() / before.norm()),  # of the loss, or of the velocity
    }


def _captured(size: Size, options: Options) -> dict[str, object]:
    """Time a call of expert choice as it is and as a CUDA graph, with its inputs and outputs copied."""
    if options.device.type != "cuda":
        return {"skipped": "CUDA graphs need a CUDA device"}
    model = make_model(size._replace(model=size.model | {"router": "ec"}), options.device, options.dtype)
    work = _call(model.eval(), size)
    before, eager = work().detach().double(), median_seconds(work, options.device)
    capture_calls(model)
    after, seconds = work().detach().double(), median_seconds(work, options.device)
    return {
        "eager_ms": 1e3 * eager,
        "captured_ms": 1e3 * seconds,
        "eager_over_captured": eager / seconds,
        "distance": float((after - before).norm() / before.norm()),
    }


if __name__ == "__main__":
    main()
