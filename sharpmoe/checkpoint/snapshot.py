"""A run's state at one step, copied to the host: all that a checkpoint is made of."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sharpmoe.checkpoint import rng
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.model.dit import DiT
from sharpmoe.parallel.ranks.background import HostCopies
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import EMA, MASTER, Engine
from sharpmoe.parallel.zero.partitions import Piece

WEIGHTS = {"live": MASTER, "ema": EMA}  # weights files -> the kind of partitions they are put together from


class Contents(NamedTuple):
    """What a checkpoint is made of."""

    engine: Engine
    ema: ShardEma
    model: DiT  # the part of the engine's module that becomes live.safetensors and ema.safetensors
    origin: Mapping[str, str]  # codec and encoder, for the header of both


class Snapshot(NamedTuple):
    """Host copies of one rank's part. Valid until the next is taken."""

    progress: Progress
    partitions: dict[str, list[Tensor]]  # master, average and each tensor of the optimizer, flat
    pieces: list[Piece]  # of the model's parameters in those
    facts: dict[str, float]  # what of the optimizer is no tensor
    generators: dict[str, Any]
    buffers: dict[str, Tensor]  # of the model, alike on every rank
    num_bytes: int  # of the tensors that this rank will write, or send to the one that does


def take(progress: Progress, contents: Contents, copies: HostCopies) -> Snapshot:
    """Copy this rank's state to the host, between two steps. No communication.

    Costs host memory: a second copy of the rank's masters, average and optimizer state.
    """
    engine, ema, model, _ = contents
    copies.start()
    own = {**engine.partitions(), EMA: ema.shards}
    partitions = {kind: [copies.tensor(part) for part in parts] for kind, parts in own.items()}
    buffers = {name: copies.tensor(buffer) for name, buffer in model.named_buffers()}
    pieces = engine.owned_pieces(model)
    elements = sum(piece.numel for piece in pieces)
    copies.finish()
    num_bytes = 4 * elements * (len(partitions) + len(WEIGHTS))
    return Snapshot(progress, partitions, pieces, engine.facts(), rng.state(), buffers, num_bytes)


def generators_file(rank: int) -> str:
    """Name of a rank's file of generator states."""
    return f"generators_rank{rank:05d}.json"
