"""Kernels of compiled blocks: torch's Inductor lowers a block for a pretended CUDA device, and its wrapper is counted.

Inductor decides what it fuses, and writes the Python that launches the kernels, without a device; only then does it
build the kernels, and there this module stops it. What a graph returns is computed by the graph itself, on pretended
tensors. Only the child process imports this module: it replaces what torch asks of a device by the answers of an H100.
"""

import copy
import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo import device_interface
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor_config
from torch._inductor.codegen.triton_split_scan import TritonSplitScanKernel
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils import _triton
from torch.utils._python_dispatch import _disable_current_modes

from sharpmoe.config import ModelConfig
from sharpmoe.families import FAMILIES
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.compiled import compile_blocks
from sharpmoe.moe.layer import MoELayer
from tests.pretend_cuda.watch import Watch, on_device
from tests.pretend_cuda.work import Outcome, block_cases, inputs_of, on_meta, rows_of, with_gradients

LARGE, MANY = {"width": 1024, "num_heads": 16, "latent_size": 32}, 32  # a block of DiffMoE-L/2; images of a call
_DEVICE = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)
# A line of the wrapper launches a kernel of its own (`triton_per_fused_add_0.run(`), calls a library's
# (`extern_kernels.mm(`), or an operator of torch (`buf3 = torch.ops.aten.topk.default(`).
_LAUNCHES = (
    re.compile(r"\b(triton_[a-z]+)_\w+\.run\("),
    re.compile(r"\bextern_kernels\.(\w+)\("),
    re.compile(r"= torch\.ops\.\w+\.(\w+)\.\w+\("),
    re.compile(r"\b(?:workspace_\w+|buf\w+)\.(zero_|copy_)\("),
)
# Kernels of one call, where they are known to be several: as `watch.Watch` counts them.
_SEVERAL = {"_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_efficient_attention_backward": 3}


class _LoweredError(Exception):
    """Ends a compilation when the wrapper is written; it holds its text."""


class _Interface(device_interface.CudaInterface):
    class Worker(device_interface.CudaInterface.Worker):
        @staticmethod
        def get_device_properties(device: Any = None) -> Any:
            return _DEVICE

        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def set_device(device: Any) -> None:
            pass

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return _DEVICE

    @staticmethod
    def get_compute_capability(device: Any = None) -> int:
        return 10 * _DEVICE.major + _DEVICE.minor

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def raise_if_triton_unavailable(device: Any = None) -> None:
        pass


# Constants are folded on the device; here on the host.
_LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")
_LIBRARY.impl("empty.memory_format", lambda size, dtype=None, **rest: torch.empty(size, dtype=dtype, device="cpu"))


def _answers() -> Iterator[Any]:
    """Replace, each by a patch, what torch asks of a device or of triton."""
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: _DEVICE,
        "get_device_capability": lambda device=None: (_DEVICE.major, _DEVICE.minor),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    yield from (mock.patch.object(torch.cuda, name, answer) for name, answer in cuda.items())
    yield mock.patch.object(torch.accelerator, "is_available", lambda: False)  # noqa: PT008 (no streams)
    device_interface.init_device_reg()
    yield mock.patch.dict(device_interface.device_interfaces, {"cuda": _Interface})
    yield mock.patch.object(_triton, "triton_hash_with_backend", lambda: "0" * 64)  # noqa: PT008
    if not _triton.has_triton_package():
        yield mock.patch.object(TritonSplitScanKernel, "scan", _with_types(TritonSplitScanKernel.scan))
    for module in (scheduler, compile_fx):
        yield mock.patch.object(module, "has_triton", lambda *device: True)  # noqa: PT008 (no mock: torch reads it)
    for passes in (joint_graph, post_grad):  # patterns are traced with small tensors; on the host they are the same
        yield mock.patch.object(passes, "lazy_init", _with_host(passes.lazy_init))
    yield mock.patch.object(GraphLowering, "_compile_to_module", _stop)
    yield mock.patch.object(functional, "scaled_dot_product_attention", _attention)
    # Padding of products is decided by timing them; sizes of real models need none.
    yield inductor_config.patch(fx_graph_cache=False, compile_threads=1, shape_padding=False)


@contextmanager
def _answered() -> Iterator[None]:
    with ExitStack() as stack:
        for answer in _answers():
            stack.enter_context(answer)
        yield


def _with_types(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Let a long scan ask triton for the widths of types; nothing else is asked of the package."""
    package, language = ModuleType("triton"), ModuleType("triton.language")
    for name, bits in {"int32": 32, "int64": 64, "uint32": 32, "uint64": 64, "float32": 32}.items():
        setattr(language, name, SimpleNamespace(primitive_bitwidth=bits))
    setattr(package, "language", language)  # noqa: B010

    def with_types(*given: Any) -> Any:
        with mock.patch.dict(sys.modules, {"triton": package, "triton.language": language}):
            return scan(*given)

    return with_types


def _with_host(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device=None: function(torch.device("cpu"))


def _stop(graph: GraphLowering) -> None:
    wrapper, _ = graph.codegen()
    raise _LoweredError(wrapper.value)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Call the kernels that torch chooses on an H100 in bf16; the choice itself needs a CUDA build."""
    if attn_mask is None:
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return flash
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]
    return out


class LoweredModel:
    """A model with compiled blocks, whose kernels are counted when blocks are called: those that Inductor launches, and
    those of experts that run uncompiled between two graphs. Calls give pretended results.
    """

    def __init__(self, model: Backbone, rows: int, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.watch = Watch(rows)
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.wrappers: list[str] = []
        compile_blocks(model, backend=self._compile)
        for layer in model.moe_layers():
            setattr(layer, "serve_untraced", torch.compiler.disable(self._watched(layer)))  # noqa: B010

    def call(self, block: nn.Module, inputs: Sequence[Any]) -> Any:
        """Call a block forward, outside of any mode: within one torch.compile does nothing."""
        with _answered():
            return block(*inputs)

    def run_backward(self, outputs: Sequence[Tensor]) -> Counter[str]:
        """Send gradients into a block from its outputs; return the kernels that were launched uncompiled."""
        self.watch.clear()
        with _answered(), self.fake_mode:
            gradients = [torch.empty_like(each) for each in outputs]
            with self.watch:
                torch.autograd.backward(outputs, gradients)
        return self.watch.kernels

    def _watched(self, layer: MoELayer) -> Callable[..., Tensor]:
        def serve(x: Tensor, assignment: Any) -> Tensor:
            with self.fake_mode, self.watch:
                return layer.serve(x, assignment)

        return serve

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=self._lower)

    def _lower(self, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        unchanged = copy.deepcopy(graph)
        with _disable_current_modes():
            try:
                compile_fx.compile_fx_inner(graph, inputs, **settings)
            except Exception as error:  # noqa: BLE001 (Inductor wraps what ends it in an error of its own)
                wrapper = _text_of(error)
        self.wrappers.append(wrapper)
        (self.backward if settings.get("is_backward") else self.forward).update(launches(wrapper))

        def call(arguments: list[Any]) -> Any:
            with _disable_current_modes(), self.fake_mode:
                return unchanged(*arguments)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


def _text_of(error: BaseException) -> str:
    found: BaseException | None = error
    while found is not None and not isinstance(found, _LoweredError):
        found = found.__cause__ or found.__context__
    if found is None:
        raise error
    return str(found.args[0])


def launches(wrapper: str) -> Counter[str]:
    """Count the kernels that a wrapper launches, by kind: Inductor's own, products, and operators that it calls."""
    body = wrapper[wrapper.index("def call(") :]
    found: Counter[str] = Counter()
    for line in body.splitlines():
        for pattern in _LAUNCHES:
            if match := pattern.search(line):
                found[match[1]] += _SEVERAL.get(match[1], 1)
                break
    return found


def compiled_block(model: ModelConfig, guided: bool) -> dict[str, Outcome]:
    """The same counts of the block as Inductor compiles it, at the sizes of a real model: fusion depends on them."""
    outcomes: dict[str, Outcome] = {}
    for mode in ("inference", "forward"):
        torch._dynamo.reset()
        network, fake_mode = on_meta(lambda: build_model(model)), FakeTensorMode(allow_non_fake_inputs=True)
        with _answered(), fake_mode, Watch(rows_of(model, MANY)):  # which answers reads
            on_device(network, torch.bfloat16).train(mode == "forward")
            part = network.blocks[-1]
            inputs = inputs_of(network, part, guided, MANY)
        lowered = LoweredModel(network, rows_of(model, MANY), fake_mode)
        with torch.set_grad_enabled(mode == "forward"):
            y, record = lowered.call(part, inputs)
        outcomes[mode] = _sum_of(lowered.forward, lowered.watch.kernels, len(lowered.wrappers))
        if mode == "forward":
            graphs = len(lowered.wrappers)
            between = lowered.run_backward(with_gradients(y, record))
            outcomes["backward"] = _sum_of(lowered.backward, between, len(lowered.wrappers) - graphs)
    return outcomes


def _sum_of(compiled: Counter[str], uncompiled: Counter[str], graphs: int) -> Outcome:
    found = {"kernels": dict(compiled), "uncompiled": dict(uncompiled), "graphs": graphs}
    return found | {"launches": compiled.total() + uncompiled.total()}


def _compiled(wanted: str) -> Iterator[tuple[str, Outcome]]:
    """Compiled blocks whose name begins as wanted."""
    for name, model, guided in block_cases(**LARGE):
        if name.startswith(wanted) and (guided or not model.family.has_experts):
            yield from ((f"{name} {part}", found) for part, found in compiled_block(model, guided).items())


GROUPS: Mapping[str, Callable[[], Iterator[tuple[str, Outcome]]]] = {
    "compiled": lambda: _compiled("diffmoe class guided"),
    **{f"compiled {router}": functools.partial(_compiled, f"{router} ") for router in FAMILIES},
}
