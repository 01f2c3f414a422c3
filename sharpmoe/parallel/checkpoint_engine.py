"""How DeepSpeed's checkpoint files are taken and read: copied to the host, never unpickled freely.

DeepSpeed asks a checkpoint engine to write each file. This one copies what it is handed to the host and keeps it, so
that training goes on while a thread writes (sharpmoe.train.saving). Pinned: DeepSpeed 0.19.8.
"""

import copy
import errno
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from sharpmoe.errors import CheckpointError

# What an optimizer shard of DeepSpeed 0.19.8 holds beside tensors; everything else is refused when it is read.
_SAFE_CLASSES = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
# All that torch.load and the restricted unpickler are known to raise on files that are no checkpoints.
_UNREADABLE = (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, ImportError)


def write_tensors(state: Any, path: str | Path) -> None:
    """torch.save with its errors as OSError: it reports a full disk as RuntimeError."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error


def read_tensors(path: str | Path, map_location: Any = "cpu") -> Any:
    """torch.load of tensors, plain values and the few classes of `_SAFE_CLASSES`; nothing in the file is executed.

    Raises CheckpointError where the file holds anything else, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}); resume from another checkpoint") from error


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

    def state(self, value: Any) -> Any:
        """Copy a nest of dicts, lists and tuples with all tensors in it."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, dict):
            copied = copy.copy(value)  # keeps the kind of dict and what torch attaches to it
            copied.update({key: self.state(item) for key, item in value.items()})
            return copied
        if isinstance(value, list):
            return [self.state(item) for item in value]
        if isinstance(value, tuple):
            items = [self.state(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return copy.deepcopy(value)

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


class CheckpointFiles(TorchCheckpointEngine):
    """What DeepSpeed takes for a checkpoint engine: it writes nothing and reads tensors and named classes only."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: HostCopies | None = None  # set while a checkpoint is taken
        self.taken: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Leave the disk alone."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy what would be written to the host."""
        assert self.copies is not None
        self.taken[path] = self.copies.state(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; see `read_tensors`."""
        return read_tensors(path, map_location)
