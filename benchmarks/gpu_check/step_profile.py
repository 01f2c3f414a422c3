"""Where the time of a rollout step goes: python -m benchmarks.gpu_check.step_profile --device cuda --facts FILE.

One rollout step (forward, losses, backward) of DiffMoE with saliency routers, S to L, with float32 products in float32
and in TensorFloat-32: kernels, share of the time in which the device runs none, the kernels that take longest, memory,
FLOP/s against the rate of one large product, and the same step as one CUDA graph, which costs one launch. Then, per
router family, how often a step makes the host wait for the device, and where.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.cuda import CUDAGraph
from torch.profiler import ProfilerActivity, profile

from benchmarks.gemms import Gemm, bare
from benchmarks.gpu_check.environment import part_parser
from benchmarks.gpu_check.facts import Facts
from benchmarks.harness import Options, SizeTable, sizes_for
from benchmarks.rollout import Rollout, Size, make_model, make_rollout
from sharpmoe.devices import wait_for
from sharpmoe.errors import ConfigError
from sharpmoe.families import FAMILIES, rows_of_call
from sharpmoe.model.flops import Call, backward_flops, forward_flops, products

_L, _B, _S = ({"preset": preset, "num_experts": 8} for preset in "lbs")
_SIZES: SizeTable[list[Size]] = {
    "tiny": {0: [Size("tiny_2", {"preset": "tiny", "depth": 2, "num_experts": 4, "latent_size": 8}, 2)]},
    "cuda": {
        0: [Size("b_8", _B, 8), Size("s_16", _S, 16)],
        22: [Size("l_8", _L, 8), Size("b_32", _B, 32), Size("s_32", _S, 32)],
        36: [Size("l_32", _L, 32), Size("l_8", _L, 8), Size("b_32", _B, 32), Size("s_32", _S, 32)],
    },
}
_GEMM = {"tiny": Gemm(1, 256, 128, 512, 1), "cuda": Gemm(1, 8192, 4096, 4096, 1)}
_WAITED = {"width": 64, "depth": 2, "num_heads": 2, "latent_size": 32, "num_experts": 8}
_TOP = 20


class Span(NamedTuple):
    """One kernel (on a CPU: operator) of a profile, in microseconds."""

    name: str
    start: float
    end: float


def main(argv: Sequence[str] | None = None) -> None:
    given = part_parser(__doc__).parse_args(argv)
    facts, device = Facts(given.facts), torch.device(given.device)
    options = Options(device, torch.bfloat16, "bf16", tiny=device.type == "cpu")
    gemm = _GEMM["tiny" if options.tiny else "cuda"]
    rate = gemm.flops / median_seconds(bare([gemm], options), device, 20) / 1e12
    facts.tell(fact="gemm", shape=f"{gemm.m} x {gemm.k} x {gemm.n}", tflops=rate)
    for size in sizes_for(_SIZES, options):
        for precision in ("highest", "high"):
            with float32_products(precision):
                found = attempted(_profiled, size, options, rate)
            facts.tell(fact="step", case=size.name, fp32_products=precision, **found)
        facts.tell(fact="graph", case=size.name, **attempted(_graph, size, options))
    of_dit = [name for name, row in FAMILIES.items() if row.competition is not None and "backbone" not in row.published]
    for router in of_dit:
        facts.tell(fact="waits", router=router, **attempted(_waits, router, options))


def attempted(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Return what a measurement finds, or its error; its memory is free afterwards."""
    try:
        return measure(*given)
    except (RuntimeError, ConfigError) as error:  # also of too little memory, and of what a CUDA graph does not allow
        return {"error": " ".join(str(error).split())[:400]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within the context products of float32 have this precision: highest, or high (TensorFloat-32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def median_seconds(work: Callable[[], object], device: torch.device, count: int = 5) -> float:
    """Return the median time of work, read when the device has finished."""
    work()
    times = []
    for _ in range(count):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[count // 2]


def _profiled(size: Size, options: Options, rate: float) -> dict[str, Any]:
    device, rollout = options.device, _rollout(size, options)
    seconds = median_seconds(rollout.__call__, device)
    began = time.perf_counter()
    rollout()
    issued = time.perf_counter() - began
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        rollout()
        wait_for(device)
    spans = spans_of(profiler.events() or [], device)
    busy, flops = busy_seconds(spans), _flops(rollout)
    tflops = flops / seconds / 1e12
    return {
        "ms": 1e3 * seconds,
        "issue_ms": 1e3 * issued,  # until the host has issued everything
        "busy_ms": 1e3 * busy,
        "idle_share": max(0.0, 1 - busy / seconds),
        "kernels": len(spans),
        "tflops": tflops,
        "of_gemm": tflops / rate,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "top": top_spans(spans, _TOP),
    }


def _rollout(size: Size, options: Options) -> Rollout:
    """One rollout step with saliency routers; L_routing acts on it too."""
    return make_rollout(make_model(size, options.device, options.dtype), size, 1)


def _flops(rollout: Rollout) -> float:
    config, images = rollout.objective.model.config, len(rollout.item.x0)
    rows = rows_of_call(config, images, config.num_tokens) * config.num_moe_layers
    done = products(config, Call(images=images, tokens=config.num_tokens, rows=rows, uses_x0_prev=True))
    return forward_flops(done).total + backward_flops(done).total


def spans_of(events: Iterable[Any], device: torch.device) -> list[Span]:
    """Return the kernels of a profile; on a CPU its operators that no other operator has called."""
    if device.type == "cuda":
        chosen = [event for event in events if event.device_type == DeviceType.CUDA]
    else:
        chosen = [event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in chosen]


def busy_seconds(spans: Sequence[Span]) -> float:
    """Return the time in which at least one span runs: kernels of several streams count once."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span.start):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def top_spans(spans: Iterable[Span], count: int) -> list[dict[str, Any]]:
    """Return the names with the longest time together: microseconds, how often, share of all."""
    times: dict[str, list[float]] = {}
    for name, start, end in spans:
        times.setdefault(name[:90], []).append(end - start)
    everything = sum(map(sum, times.values())) or 1.0
    longest = sorted(times.items(), key=lambda entry: -sum(entry[1]))[:count]
    return [
        {"kernel": name, "us": round(sum(each), 1), "count": len(each), "share": round(sum(each) / everything, 4)}
        for name, each in longest
    ]


def _graph(size: Size, options: Options) -> dict[str, Any]:
    """Capture a whole step, which has fixed counts, and time its replay: what launches cost."""
    if options.device.type != "cuda":
        return {"skipped": "CUDA graphs need a CUDA device"}
    with float32_products("high"):
        rollout = _rollout(size, options)
        eager = median_seconds(rollout.__call__, options.device)
        side = torch.cuda.Stream(options.device)
        side.wait_stream(torch.cuda.current_stream(options.device))
        with torch.cuda.stream(side):
            rollout()
            rollout()
        torch.cuda.current_stream(options.device).wait_stream(side)
        captured = CUDAGraph()
        with torch.cuda.graph(captured):
            rollout()  # its gradients start as None and belong to the graph
        replayed = median_seconds(captured.replay, options.device)
    return {"eager_ms": 1e3 * eager, "graph_ms": 1e3 * replayed, "eager_over_graph": eager / replayed}


def _waits(router: str, options: Options) -> dict[str, Any]:
    """Count how often a rollout step makes the host wait, as CUDA reports it."""
    model = _WAITED | {"router": router}
    images = 2 if options.tiny else 8
    rollout = _rollout(Size("waits", model, images), options)
    rollout()
    if options.device.type != "cuda":
        return {"count": None, "skipped": "waits are reported by CUDA"}
    wait_for(options.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rollout()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "synchron" in str(warning.message)]
    places = sorted({f"{warning.filename.split('sharpmoe/')[-1]}:{warning.lineno}" for warning in found})
    return {"count": len(found), "places": places[:8]}


if __name__ == "__main__":
    main()
