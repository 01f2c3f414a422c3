"""Whether an optimizer step is taken: decided where DeepSpeed has the gradient norm and has touched nothing yet.

ZeRO-2 and ZeRO-3 (0.19.8) both measure the norm at the top of their step, the same on every rank, and drop the step
where it is not a number: gradients cleared, accumulation restarted, weights and optimizer state untouched. A norm that
is refused here is reported to them as such, so that a refused step ends on their own path, without a second measuring.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import logger

Admit = Callable[[float], bool]


class Update(NamedTuple):
    """What came of an optimizer step, the same on every rank."""

    norm: float  # of the gradient before clipping; infinite where it is not finite
    applied: bool  # False: parameters, optimizer and its step count are what they were, gradients are gone


class NormGate:
    """Stands between the norm and the update of a ZeRO optimizer."""

    def __init__(self, optimizer: Any, stage: int) -> None:
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        self._optimizer, self._stage = optimizer, stage
        self._measure: Callable[[], Any] = getattr(optimizer, name)
        self._admit: Admit = _always
        self.norm = float("inf")  # of this step's gradient, before clipping
        setattr(optimizer, name, self._judged)
        logger.addFilter(_not_of_overflow)

    def take(self, step: Callable[[], None], admit: Admit) -> float:
        """Run the optimizer's `step`, which updates only where the norm is finite and `admit(norm)`; returns the norm.

        `admit` must answer alike on every rank. Communicates what the step does.
        """
        self._admit, self.norm = admit, float("inf")
        self._optimizer.check_grad_overflow = False  # ZeRO-2: a second reading of all gradients; the norm tells as much
        step()
        if self._optimizer.overflow and self._stage == 2:
            self._forget_accumulated()
        return self.norm

    def _forget_accumulated(self) -> None:
        """ZeRO-2 keeps what was accumulated of a dropped step where the optimizer is offloaded and the model bf16."""
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None

    def _judged(self) -> Any:
        measured = self._measure()
        norms = measured if isinstance(measured, list) else [measured]
        self.norm = float(combine_grad_norm_groups(norms)) / float(self._optimizer.loss_scale)
        if self.norm != float("inf") and self._admit(self.norm):
            return measured
        self._optimizer.check_grad_overflow = True  # or ZeRO-2 in bf16 would clip by the refused norm and go on
        refused = torch.full_like(torch.as_tensor(norms[0]), float("inf"))
        return [refused] if isinstance(measured, list) else refused


def _not_of_overflow(record: logging.LogRecord) -> bool:
    """DeepSpeed calls every dropped step an overflow; the run says itself what was wrong."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def _always(norm: float) -> bool:
    return True
