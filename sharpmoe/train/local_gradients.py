"""Gradients of all backwards of an optimizer step but its last, added up on this rank.

ZeRO reduces whatever reaches a parameter, at every backward. So all graphs but the last of a step are differentiated
apart from the parameters, and their sum joins the last backward: it is reduced once, at the cost of one whole gradient
per rank, which a graph of several rollout steps takes too (autograd holds it until a parameter's last use).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class LocalGradients:
    """The sum of the gradients of some losses. Nothing here communicates, and no hook of ZeRO sees them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}  # no entry where no graph had the parameter

    def add(self, loss: Tensor) -> None:
        """Differentiate `loss` and free its graph. Sums are float32 or better, whatever the parameters are.

        A gradient is added as soon as it is computed, while it is still in the cache, and then freed: there are never
        two whole sets of gradients at one time.
        """
        handles = [parameter.register_hook(partial(self._take, parameter)) for parameter in self._parameters]
        torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for handle in handles:
            handle.remove()

    def _take(self, parameter: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
        """Hook on a parameter: add its gradient, and return a zero that takes no memory."""
        if gradient is None:
            return None
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)
        else:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[parameter] = torch.empty_like(gradient, dtype=wide).copy_(gradient)
        return gradient.new_zeros(()).expand_as(gradient)

    def join(self, loss: Tensor) -> Tensor:
        """Return `loss`, whose backward now yields the sum too. Call it once, with the last loss."""
        if not self._sums:
            return loss
        parameters, sums = list(self._sums), list(self._sums.values())
        self._sums.clear()
        joined: Tensor = _Join.apply(loss, sums, *parameters)
        return joined


class _Join(torch.autograd.Function):
    """The identity on a loss; its backward returns the given sums, times the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, sums: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.sums, ctx.dtypes = sums, [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Taken from the list one by one: there is never a wide and a rounded copy of the whole at one time.
        return gradient, None, *[ctx.sums.pop(0).mul_(gradient).to(dtype) for dtype in ctx.dtypes]
