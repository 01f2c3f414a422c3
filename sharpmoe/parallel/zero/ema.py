"""Exponential moving average of the float32 master weights, computed on the shards.

No communication; 4 bytes per parameter, divided by the number of ranks. The module's own parameters cannot be averaged:
under ZeRO-3 they are empty tensors.
"""

import torch
from torch import Tensor, nn

from sharpmoe.parallel.zero.engine import Engine


class ShardEma:
    """This rank's part of the average: one flat shard per partition of this rank's masters."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.shards: list[Tensor] = [part.detach().clone() for part in engine.state.masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step: ema = decay * ema + (1 - decay) * master."""
        masters = [part.detach() for part in self._engine.state.masters()]
        torch._foreach_lerp_(self.shards, masters, 1 - self.decay)

    def full_weights(
        self, module: nn.Module, everywhere: bool = False, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the average of `module`'s parameters, whole, with its buffers: see `Engine.full_weights`."""
        with self._engine.masters_replaced(self.shards):
            return self._engine.full_weights(module, everywhere, dtype)
