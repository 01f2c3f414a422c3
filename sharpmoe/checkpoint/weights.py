"""Whole weights from the ranks' copies of their partitions: live.safetensors and ema.safetensors.

Runs in the thread that saves: over `SideGroup`, not over the group that trains, and a few megabytes at a time, so that
no rank need hold the model whole.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sharpmoe.model.weights import TensorSpec
from sharpmoe.parallel.ranks.background import SideGroup
from sharpmoe.parallel.zero.partitions import Piece

_BATCH = 1 << 24  # bytes of parameters that are put together at once

Table = list[dict[str, list[Piece]]]  # of each rank: its pieces by parameter


def gather_table(pieces: Sequence[Piece], peers: SideGroup) -> Table:
    """Tell every rank who owns what. Communicates."""
    return [_by_name(theirs) for theirs in peers.gather(list(pieces))]


def whole_tensors(
    planned: Mapping[str, TensorSpec],
    table: Table,
    parts: Sequence[Tensor],
    buffers: Mapping[str, Tensor],
    peers: SideGroup,
) -> Iterator[tuple[str, Tensor | None]]:
    """Each planned tensor, whole, in order: on rank 0, None elsewhere.

    parts: this rank's flat partitions (float32, on the host). buffers: of the model. Communicates at every step, so
    every rank iterates to the end. CheckpointError where a rank is gone.
    """
    for names in _batches({name: plan for name, plan in planned.items() if name not in buffers}):
        mine = _owned(names, table[peers.world.rank], parts)
        if not peers.world.is_main:
            if mine.numel():
                peers.send(mine)
            yield from ((name, None) for name in names)
            continue
        whole = {name: torch.empty(planned[name].shape.numel()) for name in names}
        counts = [sum(piece.numel for name in names for piece in owned.get(name, ())) for owned in table]
        assert sum(counts) == sum(part.numel() for part in whole.values())
        for rank, (owned, count) in enumerate(zip(table, counts, strict=True)):
            if count:
                _scatter(whole, names, owned, peers.receive(rank, count) if rank else mine)
        yield from ((name, whole[name].view(planned[name].shape)) for name in names)
    yield from ((name, buffers[name] if peers.world.is_main else None) for name in planned if name in buffers)


def _by_name(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found


def _batches(planned: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, plan in planned.items():
        if names and size + plan.num_bytes > _BATCH:
            yield names
            names, size = [], 0
        names.append(name)
        size += plan.num_bytes
    if names:
        yield names


def _owned(names: Sequence[str], owned: Mapping[str, Sequence[Piece]], parts: Sequence[Tensor]) -> Tensor:
    """This rank's pieces of some parameters, end to end."""
    pieces = [piece for name in names for piece in owned.get(name, ())]
    found = [parts[piece.part].narrow(0, piece.start, piece.numel) for piece in pieces]
    return torch.cat(found) if found else torch.empty(0)


def _scatter(
    whole: Mapping[str, Tensor], names: Sequence[str], owned: Mapping[str, Sequence[Piece]], values: Tensor
) -> None:
    """Put one rank's pieces where they belong."""
    place = 0
    for piece in (piece for name in names for piece in owned.get(name, ())):
        whole[piece.name].narrow(0, piece.place, piece.numel).copy_(values.narrow(0, place, piece.numel))
        place += piece.numel
