"""What a pretended device sees: kernels, host reads, copies from the host, and operators that mix devices."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
# Operators that launch nothing: views, allocations, questions to the host's own record of a tensor.
NO_KERNEL = frozenset(
    {
        "_has_compatible_shallow_copy_type",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "device",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "flatten",
        "is_same_size",
        "lift_fresh",
        "narrow",
        "new_empty",
        "new_empty_strided",
        "permute",
        "record_stream",
        "reshape",
        "resize_",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as_real",
    }
)
# Operators whose result has a size that only the device knows, or that answer with a Python value.
READS = frozenset({"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "is_nonzero"})
COPIES = ("_to_copy", "copy_")

# Operators of one kernel that a CPU build would take apart, having no kernel of theirs for CUDA.
_ONE_KERNEL = ("silu_backward", "silu_backward.grad_input")
_LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")


def _never_called(*args: Any) -> None:
    raise AssertionError("a pretended tensor reached a kernel")


for _name in _ONE_KERNEL:
    _LIBRARY.impl(_name, _never_called)


class Watch(TorchDispatchMode):
    """Record what operators on pretended CUDA tensors would cost; every entry is the place in the code -> how often.

    rows: what a read of the device answers where it asks for numbers of rows; all rows of a layer together. The counts
    of kernels are operators that launch at least one: some launch several (a sum of large rows, a top-k), and those
    that libraries fuse (attention) are one.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.kernels: Counter[str] = Counter()  # by operator
        self.reads: Counter[str] = Counter()  # the host waits for the device
        self.copies: Counter[str] = Counter()  # from the host to the device
        self.mixed: Counter[str] = Counter()  # one operator on both; FakeTensorMode refuses most of them itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._opname, kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense" and inputs[0].is_cuda:
            self.reads[f"item {_place()}"] += 1
            return self._scalar(inputs[0])
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        before, after = ({tensor.device.type for tensor in tensors} for tensors in (inputs, outputs))
        if "cuda" in before | after:
            self._note(name, inputs, before, after)
        return out

    def _note(self, name: str, inputs: list[Tensor], before: set[str], after: set[str]) -> None:
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in inputs[1:])
        if (name in READS and "cuda" in before) or by_mask:
            self.reads[f"{name} {_place()}"] += 1
        if {"cpu", "cuda"} <= before | after:
            if name not in COPIES:
                self.mixed[f"{name} {_place()}"] += 1
            elif _goes_to_host(name, inputs, after):
                self.reads[f"{name} {_place()}"] += 1
            else:
                self.copies[f"{name} {_place()}"] += 1
        if name not in NO_KERNEL:
            self.kernels[name] += 1

    def list_of(self, tensor: Tensor) -> Any:
        """Answer `tolist` of a pretended tensor: whole numbers as rows divided over experts, others as ones."""
        self.reads[f"tolist {_place()}"] += 1
        if tensor.is_floating_point():
            return _ones(tensor.shape)
        each, last = divmod(self.rows, len(tensor))
        return [each] * (len(tensor) - 1) + [each + last]

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else self.rows


def _ones(shape: Sequence[int]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _goes_to_host(name: str, inputs: list[Tensor], after: set[str]) -> bool:
    return inputs[0].device.type == "cpu" if name == "copy_" else "cpu" in after


def _place() -> str:
    """Name the innermost function of the project that is running: file:function."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "pretend_cuda" not in file.parts and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextmanager
def pretended_device(rows: int) -> Iterator[Watch]:
    """Pretend a device: within the context make tensors with device "cuda", and run the work under the watch.

    torch's own attention has no kernel for such tensors in a CPU build; `_Attention` stands in for it.
    """
    watch, kept = Watch(rows), (functional.scaled_dot_product_attention, Tensor.tolist)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        out: Tensor = _Attention.apply(q, k, v, _checked_bias(q, k, v, attn_mask), watch)
        return out

    def tolist(tensor: Tensor) -> Any:
        return watch.list_of(tensor) if tensor.is_cuda else kept[1](tensor)

    functional.scaled_dot_product_attention = attention
    Tensor.tolist = FakeTensor.tolist = tolist  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield watch
    finally:
        functional.scaled_dot_product_attention, Tensor.tolist = kept  # type: ignore[method-assign]
        del FakeTensor.tolist


class _Attention(torch.autograd.Function):
    """Fused attention: one kernel forward, three backward; the output lies as (B, N, heads, width), as torch's does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, watch: Watch) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.watch = watch
        watch.kernels["attention"] += 1
        return _of_heads(q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.kernels["attention_backward"] += 3
        return (*(_of_heads(each) for each in ctx.saved_tensors), None, None)


def _of_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _checked_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return what attention adds to its scores; raises where devices, dtypes or shapes do not fit."""
    devices = {x.device for x in (q, k, v, mask) if x is not None}
    if len(devices) > 1 or len({q.dtype, k.dtype, v.dtype}) > 1:
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype}, {v.dtype} on {devices}")
    if mask is None:
        return None
    mask.expand(*q.shape[:3], k.shape[2])
    return _bias_of_mask(mask, q.dtype)


def _bias_of_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as torch does: bools in two kernels; rows that do not lie at multiples of 16 numbers are copied."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=dtype, device=mask.device))
    if mask.dtype != dtype:
        raise RuntimeError(f"attention of {dtype} with a bias of {mask.dtype}")
    if any(stride % 16 for stride, size in zip(mask.stride()[:-1], mask.shape, strict=False) if size > 1):
        mask = functional.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return mask


def on_device(module: nn.Module, dtype: torch.dtype) -> Any:
    """Move a module on the meta device to the pretended one, its parameters in `dtype`; returns the module."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda", dtype=dtype))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype)
    return module
