"""ZeRO-3's optimizer step without copies of gradients: they are read where they lie, and clipped while being read.

DeepSpeed (0.19.8) flattens each sub-group's gradients into a new tensor, although they already lie behind each other in
its own buffer, and then multiplies that by the clipping factor, be it one. Both are passes over memory (8 bytes per
parameter each), and a step is bound by memory: what must be moved is 4 for the norm, 28 for AdamW and 12 for the
average of the weights. Torch's fused AdamW divides each gradient by a number as it reads it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def spare_copies(zero: Any, norm: Callable[[], float]) -> None:
    """Have a ZeRO-3 optimizer update in place; `norm()`: this step's gradient norm before clipping, loss scale undone.

    Gradients are divided by the clipping factor instead of multiplied by its inverse: float32 rounding is all that
    changes.
    """
    zero._prepare_fp32_grad_for_sub_group = partial(_hand_over, zero, zero._prepare_fp32_grad_for_sub_group)
    zero.unscale_and_clip_grads = partial(_clip, zero, norm)


def _hand_over(zero: Any, flatten: Callable[[int], None], group: int) -> None:
    master, whole = zero.fp32_partitioned_groups_flat[group], joined(zero.averaged_gradients[group])
    if whole is None or whole.dtype != master.dtype:
        flatten(group)
        return
    master.grad = whole
    zero.averaged_gradients[group] = None


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """One flat view of flat tensors that lie behind each other in one storage, or None where they do not."""
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
    if divides_gradients(optimizer):
        optimizer.grad_scale = None if factor == 1 else torch.full((), factor, device=master.device)
    elif factor != 1:
        master.grad.mul_(1 / factor)


def divides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides gradients by its `grad_scale` as it reads them: torch's AdamW where it is fused."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
