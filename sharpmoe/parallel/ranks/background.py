"""What a thread needs that works beside the training: copies of tensors on the host, and a process group of its own.

Two threads must not share a process group: their collectives would be ordered differently on every rank. The group of
the thread is always gloo, on the host, whatever backend the training uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharpmoe.devices import wait_for
from sharpmoe.errors import CheckpointError, SharpMoEError, first_line
from sharpmoe.parallel.ranks.launch import World, common_error

_TIMEOUT = timedelta(hours=6)  # ranks wait here for the slowest disk; the death of a rank is noticed at once


class SideGroup:
    """A process group for one thread per rank. All ranks create it at the same time, and one thread uses it.

    Its methods raise CheckpointError where another rank is lost.
    """

    def __init__(self, world: World) -> None:
        """Create the group. Communicates where there is more than one rank."""
        self.world = world
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None

    def gather(self, value: object) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank."""
        values: list[Any] = [value] * self.world.size
        if self._group is not None:
            with _lost_rank_errors():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: Tensor) -> None:
        """Send a tensor to rank 0, which calls `receive`."""
        with _lost_rank_errors():
            dist.send(tensor.contiguous(), dst=0, group=self._group)

    def receive(self, rank: int, count: int) -> Tensor:
        """Receive `count` float32 elements from a rank."""
        tensor = torch.empty(count)
        with _lost_rank_errors():
            dist.recv(tensor, src=rank, group=self._group)
        return tensor

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Turn a SharpMoEError of one rank into an error on all, as `launch.raise_on_all_ranks`.

        Where the body communicates, it must do so on every rank, with or without an error.
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
def _lost_rank_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(f"a rank was lost during a save ({first_line(error)})") from error


class _Copied(NamedTuple):
    source: Tensor  # kept alive: its memory, which is the key, must not be reused for another tensor
    copy: Tensor


class HostCopies:
    """Copies of tensors on the host, in buffers that are reused: allocating and pinning take longer than copying.

    A tensor that is copied several times shares one copy. Copies are valid until the next `start`.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._copied: dict[tuple[Any, ...], _Copied] = {}
        self._used = 0

    def start(self) -> None:
        """Begin a new set of copies, which overwrites the previous one."""
        self._used = 0

    def finish(self) -> int:
        """Wait until all copies of this set are complete; return their bytes."""
        for device in {copied.source.device for copied in self._copied.values()}:
            wait_for(device)
        self._copied.clear()
        return sum(buffer.nbytes for buffer in self._buffers[: self._used])

    def tensor(self, source: Tensor) -> Tensor:
        """Start copying one tensor, which must not change before `finish`; return the copy."""
        source = source.detach()
        storage = source.untyped_storage().data_ptr()
        key = (storage, source.storage_offset(), source.shape, source.stride(), source.dtype)
        if not source.numel() or key not in self._copied:
            buffer = self._next_buffer(source)
            buffer.copy_(source, non_blocking=True)
            self._copied[key] = _Copied(source, buffer)
        return self._copied[key].copy

    def _next_buffer(self, source: Tensor) -> Tensor:
        """Return the buffer of the same index in the previous set, or a new one where shape or dtype differ."""
        index, self._used = self._used, self._used + 1
        if index < len(self._buffers):
            buffer = self._buffers[index]
            if buffer.shape == source.shape and buffer.dtype == source.dtype and buffer.is_pinned() == source.is_cuda:
                return buffer
        buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self._buffers[index : index + 1] = [buffer]
        return buffer
