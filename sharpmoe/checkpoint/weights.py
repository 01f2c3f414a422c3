"""Assemble whole weights from the ranks' copies of their partitions, for live.safetensors and ema.safetensors.

Runs in the saving thread: over `SideGroup`, not over the group of the training, and a few megabytes at a time, so that
no rank has to hold the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor

from sharpmoe.checkpoint.state import Contents
from sharpmoe.errors import CheckpointError, first_line
from sharpmoe.model.weights import TensorSpec
from sharpmoe.parallel.ranks.background import SideGroup
from sharpmoe.parallel.zero.partitions import Piece

_BATCH = 1 << 24  # bytes of parameters that are assembled at once

_Table = list[dict[str, list[Piece]]]  # per rank: its pieces by parameter


def gather_table(pieces: Sequence[Piece], peers: SideGroup) -> _Table:
    """Return the pieces of all ranks, on every rank. Communicates."""
    return [_by_name(theirs) for theirs in peers.gather(list(pieces))]


def whole_tensors(
    specs: Mapping[str, TensorSpec],
    table: _Table,
    parts: Sequence[Tensor],
    buffers: Mapping[str, Tensor],
    contents: Contents,
    peers: SideGroup,
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each tensor of a weights file, whole, in the order of `specs`, on rank 0; None on other ranks.

    parts: this rank's flat partitions (float32, on the host). buffers: of the model. Frozen parameters, of which no
    rank has a piece, are read by rank 0 from `contents.frozen`, bit for bit as the run did when it started; to those
    with adapters the product of these is added. Communicates at every step, so every rank must iterate to the end;
    where a frozen parameter cannot be read, rank 0 yields None from there on, and CheckpointError is raised at the end.
    Raises CheckpointError where a rank is lost.
    """
    adapters = contents.adapters
    pairs = adapters.pairs if adapters is not None else {}
    shapes = {name: spec.shape for name, spec in specs.items()} | (dict(adapters.shapes) if adapters else {})
    trained = {name for owned in table for name in owned}
    failure: CheckpointError | None = None
    for names in _batches({name: spec for name, spec in specs.items() if name not in buffers}):
        own = [one for name in names for one in pairs.get(name, (name,)) if one in trained]
        mine = _owned(own, table[peers.world.rank], parts)
        if not peers.world.is_main:
            if mine.numel():
                peers.send(mine)
            yield from ((name, None) for name in names)
            continue
        whole = {name: torch.empty(shapes[name].numel()) for name in own}
        counts = [sum(piece.numel for name in own for piece in owned.get(name, ())) for owned in table]
        assert sum(counts) == sum(part.numel() for part in whole.values())
        for rank, (owned, count) in enumerate(zip(table, counts, strict=True)):
            if count:
                _scatter(whole, own, owned, peers.receive(rank, count) if rank else mine)
        for name in names:
            value: Tensor | None = None
            if name in trained:
                value = whole[name].view(shapes[name])
            elif failure is None:
                try:
                    value = _frozen(name, shapes[name], contents)
                except CheckpointError as error:  # not raised yet: the other ranks still send
                    failure = error
            if name in pairs and value is not None:
                assert adapters is not None
                value = adapters.merged(value, *(whole[one].view(shapes[one]) for one in pairs[name]))
            yield name, value if failure is None else None
    if failure is not None:
        raise failure
    yield from ((name, buffers[name] if peers.world.is_main else None) for name in specs if name in buffers)


def _frozen(name: str, shape: torch.Size, contents: Contents) -> Tensor:
    """Read a frozen parameter again. Raises CheckpointError where that fails: its file may have been moved since."""
    assert contents.frozen is not None
    try:
        return contents.frozen(name, shape, None)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: a frozen parameter cannot be read again from the weights that the run started from "
            f"({first_line(error)}); leave them in place while it runs"
        ) from error


def _by_name(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return found


def _batches(specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, spec in specs.items():
        if names and size + spec.num_bytes > _BATCH:
            yield names
            names, size = [], 0
        names.append(name)
        size += spec.num_bytes
    if names:
        yield names


def _owned(names: Sequence[str], owned: Mapping[str, Sequence[Piece]], parts: Sequence[Tensor]) -> Tensor:
    """Return this rank's pieces of some parameters, concatenated."""
    pieces = [piece for name in names for piece in owned.get(name, ())]
    found = [parts[piece.part].narrow(0, piece.start, piece.numel) for piece in pieces]
    return torch.cat(found) if found else torch.empty(0)


def _scatter(
    whole: Mapping[str, Tensor], names: Sequence[str], owned: Mapping[str, Sequence[Piece]], values: Tensor
) -> None:
    """Copy one rank's pieces into the whole parameters."""
    start = 0
    for piece in (piece for name in names for piece in owned.get(name, ())):
        whole[piece.name].narrow(0, piece.place, piece.numel).copy_(values.narrow(0, start, piece.numel))
        start += piece.numel
