"""The ranks once more, over a process group of their own: for a thread that works beside the one that trains.

Two threads must not share a group: their collectives would meet in another order on every rank. Always gloo, on the
host, whatever the training group runs on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharpmoe.errors import CheckpointError, SharpMoEError
from sharpmoe.parallel.ranks.launch import World, common_error

_PATIENCE = timedelta(hours=6)  # a rank waits here for the slowest disk; the death of a peer is noticed at once


class SideGroup:
    """Exchange between the threads of all ranks. Every rank makes one, at the same time; one thread uses it."""

    def __init__(self, world: World) -> None:
        """Make the group. Communicates where there is more than one rank."""
        self.world = world
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world.size > 1 else None

    def gather(self, value: object) -> list[Any]:
        """Collect every rank's picklable value, in rank order, on every rank. CheckpointError where a rank is gone."""
        values: list[Any] = [value] * self.world.size
        if self._group is not None:
            with _loss_noticed():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor to rank 0, which calls `receive`. CheckpointError where that is gone."""
        with _loss_noticed():
            dist.send(tensor.contiguous(), dst=0, group=self._group)

    def receive(self, rank: int, count: int) -> Tensor:
        """Take `count` float32 elements from a rank. CheckpointError where that is gone."""
        tensor = torch.empty(count)
        with _loss_noticed():
            dist.recv(tensor, src=rank, group=self._group)
        return tensor

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Turn an error of one rank into an error of all, as `launch.together`.

        What the body communicates, it does on every rank, error or not.
        """
        error: SharpMoEError | None = None
        try:
            yield
        except SharpMoEError as caught:
            error = caught
        errors = self.gather(error)
        if any(errors):
            raise common_error(errors)


@contextmanager
def _loss_noticed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(f"a rank was lost during a save ({str(error).splitlines()[0]})") from error
