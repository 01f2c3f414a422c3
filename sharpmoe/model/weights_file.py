"""safetensors files written tensor by tensor, so that a model of many ranks need not be whole anywhere.

The library's own writer takes all tensors at once. The format is a JSON header of names, types, shapes and places,
then the bytes (https://github.com/huggingface/safetensors#format); tests read what is written with the library.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.durable import atomic_draft

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # of the first byte after the header


class Planned(NamedTuple):
    """A tensor of the file before it is there."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize


class WeightsWriter:
    """A file that appears under its name when it is complete. Use as a context; an exception inside leaves nothing."""

    def __init__(self, path: str | Path, planned: Mapping[str, Planned], header: Mapping[str, str]) -> None:
        """Write the header: every tensor's name, shape and dtype, in the order of the file. Raises OSError."""
        assert sys.byteorder == "little"
        self._planned, self._left = planned, list(planned)
        with ExitStack() as stack:
            draft = stack.enter_context(atomic_draft(Path(path)))
            self._file = stack.enter_context(draft.open("wb"))
            self._file.write(_header(planned, header))
            self._stack = stack.pop_all()

    def write(self, name: str, value: Tensor) -> None:
        """Append the next tensor, converted to its planned dtype. Raises OSError."""
        assert self._left
        assert name == self._left.pop(0), name
        plan = self._planned[name]
        assert value.shape == plan.shape, name
        whole = value.detach().to("cpu", plan.dtype).contiguous()
        self._file.write(whole.reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert kind is not None or not self._left, f"{self._left[0]} was not written"
        self._stack.__exit__(kind, error, trace)


def _header(planned: Mapping[str, Planned], header: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(header)}
    place = 0
    for name, plan in planned.items():
        end = place + plan.num_bytes
        content[name] = {"dtype": _NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
