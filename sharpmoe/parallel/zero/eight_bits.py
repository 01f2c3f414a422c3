"""Optimizer states of bitsandbytes in 8 bits, as float32 numbers that a checkpoint keeps element by element.

A state is an index into a table of 256 numbers per element, times one number per block of elements. Blocks begin anew
in every flat partition, so that a run with another number of ranks has others. A checkpoint therefore has the number
that a state stands for and that of its block, both per element: the same layout gets its indices back bit for bit,
another one rounds to its own blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MOMENTS = {"1": "exp_avg", "2": "exp_avg_sq"}
_SCALE = "_block"


def unpack(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the states of one flat partition as float32; nothing where they are not those of bitsandbytes."""
    found = {}
    for index, kind in _MOMENTS.items():
        values = state.get(f"state{index}")
        if values is None:
            return {}
        if values.dtype == torch.uint8:
            scale = _per_element(state[f"absmax{index}"], _block(state, index), len(values))
            found[kind], found[kind + _SCALE] = state[f"qmap{index}"][values.long()] * scale, scale
        else:  # a partition with few elements is kept in float32
            found[kind], found[kind + _SCALE] = values.clone(), torch.zeros_like(values)
    return found


def pack(state: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Set the states of bitsandbytes in one flat partition, in place, from what `unpack` returned of any layout."""
    for index, kind in _MOMENTS.items():
        values = state.get(f"state{index}")
        if values is None:
            continue
        if values.dtype != torch.uint8:
            values.copy_(found[kind])
            continue
        size, count = _block(state, index), len(values)
        scales = _blocks(found[kind + _SCALE], size)
        inside = _blocks(torch.ones_like(found[kind]), size) > 0
        is_same = ((scales == scales[:, :1]) | ~inside).all(1) & (scales[:, 0] > 0)
        absmax = torch.where(is_same, scales[:, 0], _blocks(found[kind].abs(), size).amax(1))
        share = found[kind] / _per_element(absmax, size, count).clamp(min=torch.finfo(torch.float32).tiny)
        table, order = state[f"qmap{index}"].sort()
        values.copy_(order[torch.bucketize(share, (table[1:] + table[:-1]) / 2)])
        state[f"absmax{index}"].copy_(absmax)


def _block(state: Mapping[str, Any], index: str) -> int:
    """Return the elements of a block: the power of two with which the partition has so many blocks."""
    count, blocks = len(state[f"state{index}"]), len(state[f"absmax{index}"])
    return next(1 << bits for bits in range(6, 20) if -(-count // (1 << bits)) == blocks)


def _blocks(values: Tensor, size: int) -> Tensor:
    """Return flat values as rows of one block each, padded with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


def _per_element(scales: Tensor, size: int, count: int) -> Tensor:
    return scales.repeat_interleave(size)[:count]
