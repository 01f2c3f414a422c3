"""Copies of tensors on the host, so that training goes on while a thread writes them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Copied(NamedTuple):
    source: Tensor  # kept alive, so that its memory, which names it, is not given to another tensor
    copy: Tensor


class HostCopies:
    """Copies of tensors on the host, in memory that is kept for the next time: allocating and pinning take longer.

    A tensor that stands in several places is copied once. Copies are valid until the next `start`.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._copied: dict[tuple[Any, ...], _Copied] = {}
        self._used = 0

    def start(self) -> None:
        """Begin a new set of copies; those of the last set are overwritten."""
        self._used = 0

    def finish(self) -> int:
        """Wait for the copies that are under way; returns their bytes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._copied.clear()
        return sum(buffer.nbytes for buffer in self._buffers[: self._used])

    def tensor(self, source: Tensor) -> Tensor:
        """Copy one tensor; it may be written to only after `finish`."""
        source = source.detach()
        storage = source.untyped_storage().data_ptr()
        key = (storage, source.storage_offset(), source.shape, source.stride(), source.dtype)
        if not source.numel() or key not in self._copied:
            buffer = self._next_buffer(source)
            buffer.copy_(source, non_blocking=True)
            self._copied[key] = _Copied(source, buffer)
        return self._copied[key].copy

    def _next_buffer(self, source: Tensor) -> Tensor:
        """The buffer of the same place in the last set, where it is of the same kind."""
        place, self._used = self._used, self._used + 1
        if place < len(self._buffers):
            buffer = self._buffers[place]
            if buffer.shape == source.shape and buffer.dtype == source.dtype and buffer.is_pinned() == source.is_cuda:
                return buffer
        buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self._buffers[place : place + 1] = [buffer]
        return buffer
