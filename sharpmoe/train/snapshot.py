"""A run's state at one step, copied to the host: all that a checkpoint is made of."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sharpmoe.model.dit import DiT
from sharpmoe.parallel.checkpoint_engine import HostCopies
from sharpmoe.parallel.engine import Engine
from sharpmoe.parallel.pieces import Piece
from sharpmoe.train import generators
from sharpmoe.train.ema import ShardEma
from sharpmoe.train.manifest import Progress


class Contents(NamedTuple):
    """What a checkpoint is made of."""

    engine: Engine
    ema: ShardEma
    model: DiT  # the part of the engine's module that becomes live.safetensors and ema.safetensors
    origin: Mapping[str, str]  # codec and encoder, for the header of both


class Snapshot(NamedTuple):
    """Host copies of one rank's part. Valid until the next is taken."""

    progress: Progress
    files: dict[str, Any]  # relative path -> what torch.save is to write there
    weights: dict[str, list[Tensor]]  # "live", "ema" -> flat float32 partitions
    pieces: list[Piece]  # of the model's parameters in those
    buffers: dict[str, Tensor]  # of the model, alike on every rank
    num_bytes: int  # of the tensors that this rank will write


def take(progress: Progress, contents: Contents, copies: HostCopies) -> Snapshot:
    """Copy this rank's state to the host. Every rank calls it, between two steps; DeepSpeed makes barriers.

    Costs host memory: a second copy of the rank's optimizer state, masters and average.
    """
    engine, ema, model, _ = contents
    rank = engine.world.rank
    copies.start()
    files = engine.checkpoint_files(copies)
    files[ema_file(rank)] = copies.state(ema.state())
    files[generators_file(rank)] = copies.state(generators.state())
    weights = {
        "live": [copies.tensor(part) for part in engine.master_partitions()],
        "ema": [copies.tensor(part) for part in ema.shards],
    }
    buffers = {name: copies.tensor(buffer) for name, buffer in model.named_buffers()}
    pieces = engine.owned_pieces(model)
    num_bytes = copies.finish() + 4 * len(weights) * sum(piece.size for piece in pieces)
    return Snapshot(progress, files, weights, pieces, buffers, num_bytes)


def ema_file(rank: int) -> str:
    """Name of a rank's file of the average."""
    return f"ema_rank{rank:05d}.pt"


def generators_file(rank: int) -> str:
    """Name of a rank's file of generator states."""
    return f"generators_rank{rank:05d}.pt"
