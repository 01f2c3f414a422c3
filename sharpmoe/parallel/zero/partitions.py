"""Which part of each parameter a rank owns: the map between flat master partitions and whole tensors.

ZeRO lays a rank's share of all parameters end to end. With this map a checkpoint can say of every element whose it is,
and any other layout (ranks, experts per rank, ZeRO stage) can find its own. Pinned to names of DeepSpeed 0.19.8.
"""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn

from sharpmoe.parallel.zero.placement import local_experts


class Piece(NamedTuple):
    """A run of elements of one parameter that this rank owns."""

    name: str  # of the parameter
    part: int  # which flat partition holds it
    start: int  # where in that partition
    place: int  # where in the whole parameter, all experts together, flat
    numel: int


def owned_pieces(module: nn.Module, optimizer: Any, stage: int) -> list[Piece]:
    """Pieces of `module`'s parameters in this rank's partitions, by the names of `module`. No communication.

    Over all ranks they cover every element of every parameter once; padding belongs to no piece.
    """
    find = _piece_of_stage3 if stage == 3 else _piece_of_stage2
    pieces = []
    for name, parameter in module.named_parameters():
        found = find(name, parameter, optimizer)
        if found is not None and found.numel > 0:
            pieces.append(found._replace(place=found.place + _first_element(name, parameter, module)))
    return pieces


def _first_element(name: str, parameter: Any, module: nn.Module) -> int:
    """Elements of the experts that stand before this rank's."""
    experts = local_experts(name, module)
    if experts is None:
        return 0
    local = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return int(experts.start * (local // len(experts)))


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
