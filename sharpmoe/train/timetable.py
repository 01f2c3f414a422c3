"""When a run saves: every so many steps, and when so many minutes have passed."""

import time

import torch

from sharpmoe.config import CheckpointConfig
from sharpmoe.parallel.ranks.launch import World, sum_over_ranks


class Timetable:
    """Answers alike on every rank: the minutes are those of rank 0's clock."""

    def __init__(self, config: CheckpointConfig, world: World) -> None:
        self._config, self._world = config, world
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after optimizer step `step`. Communicates (one number) where minutes are asked for."""
        config = self._config
        due = config.every > 0 and step % config.every == 0
        if config.minutes > 0 and not due:
            passed = self._world.is_main and time.monotonic() - self._last >= 60 * config.minutes
            due = bool(sum_over_ranks(torch.tensor([float(passed)]), self._world).item())
        if due:
            self._last = time.monotonic()
        return due
