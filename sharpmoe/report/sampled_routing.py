"""What happens at chosen steps of sampling, kept by one callback for film strips, counterfactuals and the demo."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sharpmoe.sampling import SamplingStep


class SampledRouting:
    """A callback of sampling that keeps chosen steps, of all batches in their order, on the CPU.

    T kept steps, L MoE layers, I images, N tokens, E experts. A model without MoE layers has no routing to keep.
    """

    def __init__(self, steps: Iterable[int], *, with_choices: bool = False) -> None:
        """Keep these steps (from 0); `with_choices`: also which experts took each token, L x E as many numbers."""
        self._steps = sorted(set(steps))
        self._with_choices = with_choices
        self._times: dict[int, float] = {}
        self._read: dict[int, list[Tensor]] = {step: [] for step in self._steps}
        self._experts: dict[int, list[Tensor]] = {step: [] for step in self._steps}
        self._choices: dict[int, list[Tensor]] = {step: [] for step in self._steps}

    def __call__(self, step: SamplingStep) -> None:
        """Keep a step, if it is one of the chosen."""
        if step.step not in self._read:
            return
        self._times[step.step] = step.t
        self._read[step.step].append((step.x0_hat if step.x0_prev is None else step.x0_prev).cpu())
        if step.routing:
            counted = torch.stack([layer.routing_map.sum(-1) for layer in step.routing]).sum(0)
            self._experts[step.step].append(counted.cpu())
            if self._with_choices:
                self._choices[step.step].append(torch.stack([layer.routing_map for layer in step.routing]).cpu())

    @property
    def times(self) -> tuple[float, ...]:
        """Times of the kept steps (T), descending."""
        return tuple(self._times[step] for step in self._steps)

    def read(self) -> list[Tensor]:
        """Return what the saliency routers read, or without them x0_hat: of each kept step (I, C, H, W) latents."""
        return [torch.cat(parts) for parts in self._read.values()]

    def experts(self) -> Tensor | None:
        """Return the experts that took each token, summed over MoE layers (T, I, N); None for a dense model."""
        if not all(self._experts.values()):
            return None
        return torch.stack([torch.cat(parts) for parts in self._experts.values()])

    def choices(self) -> Tensor:
        """Return which experts took each token, (T, L, I, N, E) bool."""
        return torch.stack([torch.cat(parts, 1) for parts in self._choices.values()])
