"""Which part of each parameter a rank owns: the map from flat master partitions to whole tensors.

Pinned to inner names of DeepSpeed 0.19.8, as the engine. With it, whole weights are put together from copies of the
partitions, by any thread and at any time, instead of by collectives of the training process group.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn


class Piece(NamedTuple):
    """A run of elements of one parameter that this rank owns."""

    name: str  # of the parameter
    part: int  # which master partition holds it
    start: int  # where in that partition
    place: int  # where in the whole parameter, flat
    size: int  # elements


def owned_pieces(module: nn.Module, optimizer: Any, stage: int) -> list[Piece]:
    """Pieces of `module`'s parameters in this rank's master partitions, by the names of `module`. No communication."""
    find = _piece_of_stage3 if stage == 3 else _piece_of_stage2
    found = [find(name, parameter, optimizer) for name, parameter in module.named_parameters()]
    return [piece for piece in found if piece is not None and piece.size > 0]


def _piece_of_stage3(name: str, parameter: Any, optimizer: Any) -> Piece | None:
    """Every parameter is cut into equal parts over its group, the last one padded."""
    part, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    place = dist.get_rank(parameter.ds_process_group) * size
    return Piece(name, part, start, place, min(size, parameter.ds_numel - place))


def _piece_of_stage2(name: str, parameter: Any, optimizer: Any) -> Piece | None:
    """All parameters of a group, end to end, are cut into equal parts: a rank owns a run of some of them."""
    owned = parameter._hp_mapping
    if owned is None:
        return None
    there = owned.lp_fragment_address
    return Piece(name, owned.param_group_index, owned.hp_fragment_address.start, there.start, there.numel)
