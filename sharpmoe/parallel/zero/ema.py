"""Exponential moving average of the float32 master weights, on the shards: no communication, 4 bytes per parameter
and world size. Averaging the module's own parameters would see empty tensors under ZeRO-3.
"""

import torch
from torch import Tensor, nn

from sharpmoe.parallel.zero.engine import Engine


class ShardEma:
    """This rank's part of the average, beside this rank's part of the masters."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self.shards: list[Tensor] = [part.detach().clone() for part in engine.master_partitions()]

    @torch.no_grad()
    def update(self) -> None:
        """Move once, after an optimizer step: ema = decay * ema + (1 - decay) * master."""
        masters = [part.detach() for part in self._engine.master_partitions()]
        torch._foreach_lerp_(self.shards, masters, 1 - self.decay)

    def full_weights(self, module: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
        """The average of `module`'s parameters, whole, with its buffers; see `Engine.full_weights`. Communicates."""
        with self._engine.masters_replaced(self.shards):
            return self._engine.full_weights(module, everywhere)
