"""ZeRO-3's optimizer step without copies of gradients: they are read where they lie, and clipped while being read.

DeepSpeed (0.19.8) copies each gradient to float64 for its norm, flattens each sub-group's gradients into a new tensor,
although they already lie behind each other in its own buffer, and multiplies that by the clipping factor, be it one.
But a step is bound by memory: what must be moved per parameter is 4 bytes for the norm, 28 for AdamW, 8 for the
forward's weights and 12 for the average. Torch's fused AdamW divides each gradient by a number as it reads it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1024  # summed in float32: a relative error of 1e-7 in each, 1e-9 in a large norm


def spare_copies(zero: Any, norm: Callable[[], float]) -> None:
    """Have a ZeRO-3 optimizer update in place; `norm()`: this step's gradient norm before clipping, loss scale undone.

    Gradients are divided by the clipping factor instead of multiplied by its inverse: float32 rounding is all that
    changes. A norm whose square float32 cannot hold is infinite, and the step refused.
    """
    zero.get_grad_norm_direct = partial(_norm_of_group, zero.get_grad_norm_direct)
    zero._prepare_fp32_grad_for_sub_group = partial(_hand_over, zero, zero._prepare_fp32_grad_for_sub_group)
    zero.unscale_and_clip_grads = partial(_clip, zero, norm)


def _norm_of_group(
    measure: Callable[..., Tensor], gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2
) -> Tensor:
    """DeepSpeed's norm over all ranks, which is given one number with the norm of all this rank's gradients instead."""
    whole = joined(gradients)
    if whole is None or norm_type != 2:
        return measure(gradients, params, norm_type)
    return measure([euclidean(whole).view(1)], params, norm_type)


def euclidean(flat: Tensor) -> Tensor:
    """Euclidean norm of a flat tensor, 0-d float64: without a copy of it, and without long sums in float32."""
    end = len(flat) // _CHUNK * _CHUNK
    chunks = torch.linalg.vector_norm(flat[:end].view(-1, _CHUNK), dim=1).double()
    return torch.linalg.vector_norm(torch.cat([chunks, flat[end:].double()]))


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
    if divides_gradients(optimizer) and not zero.offload_optimizer:  # else a part may be another optimizer's
        optimizer.grad_scale = None if factor == 1 else torch.full((), factor, device=master.device)
    elif factor != 1:
        master.grad.mul_(1 / factor)


def divides_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides gradients by its `grad_scale` as it reads them: torch's AdamW where it is fused."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])
