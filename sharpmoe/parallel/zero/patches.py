"""Every change that this project makes to DeepSpeed: methods replaced, hooks renewed, attributes set. Nowhere else.

Written for DeepSpeed 0.19.8, which `check_version` requires: an upgrade is a review of this file, of `placement` and
`partitions`, which read inner names, and of tests/contract/test_deepspeed_internals.py. One public switch must be set
before there is an engine and is set in `ranks.launch.start`: the shared-memory operator is disabled.

1. *Whether a step is taken* (`_NormGate`). ZeRO-2 and ZeRO-3 measure the gradient norm at the top of their step, the
   same on every rank, and drop the step where it is not a number: gradients cleared, accumulation restarted, weights
   and optimizer state untouched. A norm that is refused here is reported to them as infinite, so that a refused step
   takes their own path, without measuring twice.
2. *A ZeRO-3 step without copies of gradients* (`_patch_step_in_place`). DeepSpeed copies each gradient to float64 for
   its norm, flattens the gradients of each sub-group into a new tensor, although they are adjacent in its own buffer,
   and multiplies that by the clipping factor, even by one. A step is bound by memory traffic: what must be moved per
   parameter is 4 bytes for the norm, 28 for AdamW, 8 for the forward's weights and 12 for the average. Torch's fused
   AdamW divides each gradient by a number as it reads it.
3. *Parts gathered whole* (`gather_parts_whole`, `_reduce_once_per_backward`). ZeRO-3's hooks cost the host about a
   quarter of a millisecond per module and call, and a rollout makes T calls.
4. *Frozen experts* (`frozen_experts_allowed`). ZeRO-2 asserts that a model with MoE layers trains some experts.
5. *Gradients larger than the bucket* (`_keep_large_gradients`). ZeRO-2 reduces them where they are, with `overlap_comm`
   on a second stream, and lets go of them at once: their memory could be written before it is read.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from torch import Tensor, nn

from sharpmoe.errors import ConfigError
from sharpmoe.parallel.zero.build import gathered_units

Admit = Callable[[float], bool]  # gradient norm -> whether to take the step; must answer alike on every rank

_WRITTEN_FOR = "0.19.8"
_CHUNK = 1024  # summed in float32: a relative error of 1e-7 in each, 1e-9 in a large norm


class Update(NamedTuple):
    """Result of an optimizer step, the same on every rank."""

    norm: float  # of the gradient before clipping; infinite where it is not finite
    applied: bool  # False: parameters, optimizer and its step count are unchanged, gradients are cleared


def check_version() -> None:
    """Raise ConfigError where the installed DeepSpeed is not the version that these patches were written for."""
    found = deepspeed.__version__.partition("+")[0]
    if found != _WRITTEN_FOR:
        raise ConfigError(
            f"DeepSpeed {found} is installed, sharpmoe.parallel.zero is written for {_WRITTEN_FOR}; "
            f"install deepspeed=={_WRITTEN_FOR}"
        )


def patch_optimizer(zero: Any, stage: int, parts_whole: bool) -> "_NormGate":
    """Apply every change to a ZeRO optimizer; return the gate through which its steps are taken."""
    if parts_whole:
        _reduce_once_per_backward(zero)
    gate = _NormGate(zero, stage)
    if stage == 3:
        _patch_step_in_place(zero, lambda: gate.norm)
    elif zero.overlap_comm and zero.reduction_stream is not None:  # None where there are no streams: on the CPU
        _keep_large_gradients(zero)
    return gate


def gather_parts_whole(module: nn.Module) -> bool:
    """Have ZeRO-3 gather embedders, blocks and the final layer each as one; return whether the module has any."""
    parts = [part for _, part in gathered_units(module)]
    for part in parts:
        set_z3_leaf_module(part, True)
    return bool(parts)


def _reduce_once_per_backward(zero: Any) -> None:
    """Reduce each gradient when it is complete, once per backward, also in modules that are gathered whole.

    DeepSpeed reduces a leaf module's gradients at each of its calls, which is wrong for T calls in one graph.
    """
    for hook in [*zero._leaf_module_hooks, *zero._grad_acc_hooks]:
        hook.remove()
    zero._leaf_module_hooks.clear()
    zero._grad_acc_hooks.clear()
    for group in zero.fp16_groups:
        for parameter in group:
            if hasattr(parameter, "ds_z3_leaf_module"):
                del parameter.ds_z3_leaf_module
    zero.create_reduce_and_remove_grad_hooks()


@contextmanager
def frozen_experts_allowed() -> Iterator[None]:
    """Within the context a ZeRO-2 optimizer of a model with MoE layers may have no expert among its parameters."""
    original = DeepSpeedZeroOptimizer._configure_moe_settings

    def configure(zero: Any) -> None:
        if any(group.get("moe") for group in zero.optimizer.param_groups):
            original(zero)
        else:
            zero.is_moe_param_group = [False] * len(zero.optimizer.param_groups)

    DeepSpeedZeroOptimizer._configure_moe_settings = configure
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer._configure_moe_settings = original


class _NormGate:
    """Decides on each step between DeepSpeed's measuring of the gradient norm and its update."""

    def __init__(self, zero: Any, stage: int) -> None:
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        self._zero, self._stage = zero, stage
        self._measure: Callable[[], Any] = getattr(zero, name)
        self._admit: Admit = _always
        self.norm = float("inf")  # of this step's gradient, before clipping
        setattr(zero, name, self._judged)
        logger.addFilter(_is_not_overflow)

    def take(self, step: Callable[[], None], admit: Admit) -> float:
        """Run the optimizer's `step`, which updates only where the norm is finite and `admit(norm)`; return the norm.

        Communicates what `step` communicates.
        """
        self._admit, self.norm = admit, float("inf")
        self._zero.check_grad_overflow = False  # ZeRO-2 would read all gradients again; the norm says as much
        step()
        if self._zero.overflow and self._stage == 2:
            self._drop_accumulated()
        return self.norm

    def _drop_accumulated(self) -> None:
        """Clear the gradients of a dropped step, which ZeRO-2 keeps where the optimizer is offloaded in bf16."""
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = None

    def _judged(self) -> Any:
        measured = self._measure()
        norms = measured if isinstance(measured, list) else [measured]
        self.norm = float(combine_grad_norm_groups(norms)) / float(self._zero.loss_scale)
        if self.norm != float("inf") and self._admit(self.norm):
            return measured
        self._zero.check_grad_overflow = True  # or ZeRO-2 in bf16 would clip by the refused norm and update
        refused = torch.full_like(torch.as_tensor(norms[0]), float("inf"))
        return [refused] if isinstance(measured, list) else refused


def _is_not_overflow(record: logging.LogRecord) -> bool:
    """Filter DeepSpeed's log: it calls every dropped step an overflow, and the run logs the true reason."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def _always(norm: float) -> bool:
    return True


def _keep_large_gradients(zero: Any) -> None:
    """Have the memory of a ZeRO-2 gradient above `reduce_bucket_size` be reused only after its reduction.

    Such a gradient is not copied into the bucket. DeepSpeed tells the allocator which stream reads it only on ranks
    that own a part of it, or where the whole of it belongs to one rank.
    """
    average = zero.average_tensor

    def average_recorded(tensor: Tensor, wire_dtype: torch.dtype) -> None:
        if wire_dtype in zero.extra_large_param_to_reduce:
            tensor.record_stream(zero.reduction_stream)
        average(tensor, wire_dtype)

    zero.average_tensor = average_recorded


def _patch_step_in_place(zero: Any, norm: Callable[[], float]) -> None:
    """Have a ZeRO-3 optimizer update in place; `norm()`: this step's gradient norm before clipping, loss scale undone.

    Gradients are divided by the clipping factor instead of multiplied by its inverse, which changes float32 rounding
    only. A norm whose square exceeds float32 is infinite, and the step refused.
    """
    zero.get_grad_norm_direct = partial(_norm_of_group, zero.get_grad_norm_direct)
    zero._prepare_fp32_grad_for_sub_group = partial(_pass_gradient, zero, zero._prepare_fp32_grad_for_sub_group)
    zero.unscale_and_clip_grads = partial(_clip, zero, norm)


def _norm_of_group(
    measure: Callable[..., Tensor], gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2
) -> Tensor:
    """Call DeepSpeed's norm over all ranks with one number, the norm of this rank's gradients, instead of gradients."""
    whole = _joined(gradients)
    if whole is None or norm_type != 2:
        return measure(gradients, params, norm_type)
    return measure([_euclidean(whole).view(1)], params, norm_type)


def _euclidean(flat: Tensor) -> Tensor:
    """Return the Euclidean norm of a flat tensor, 0-d float64, without a copy of it and without long float32 sums."""
    end = len(flat) // _CHUNK * _CHUNK
    chunks = torch.linalg.vector_norm(flat[:end].view(-1, _CHUNK), dim=1).double()
    return torch.linalg.vector_norm(torch.cat([chunks, flat[end:].double()]))


def _pass_gradient(zero: Any, flatten: Callable[[int], None], group: int) -> None:
    """Give the optimizer the gradients of a sub-group as a view, or DeepSpeed's flattened copy where there is none."""
    master, whole = zero.fp32_partitioned_groups_flat[group], _joined(zero.averaged_gradients[group])
    if whole is None or whole.dtype != master.dtype:
        flatten(group)
        return
    master.grad = whole
    zero.averaged_gradients[group] = None


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Return one flat view of flat tensors that are adjacent in one storage, or None where they are not."""
    first = parts[0]
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    end = start
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return first.as_strided((end - start,), (1,), start)


def _clip(zero: Any, norm: Callable[[], float], group: int, total_norm: Tensor) -> None:
    factor = max((norm() + 1e-6) / zero.clip_grad, 1.0) if zero.clip_grad > 0 else 1.0
    factor *= float(zero.loss_scale)
    master, optimizer = zero.fp32_partitioned_groups_flat[group], zero.optimizer
    if _divides_gradients(optimizer) and not zero.offload_optimizer:  # else a part may be another optimizer's
        optimizer.grad_scale = None if factor == 1 else torch.full((), factor, device=master.device)
    elif factor != 1:
        master.grad.mul_(1 / factor)


def _divides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides gradients by its `grad_scale` as it reads them: torch's fused AdamW."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
