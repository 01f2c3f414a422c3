"""A rank's part of the training state as one safetensors file that any other layout can read.

state_rank00000.safetensors holds KIND/PARAMETER for each piece that this rank owns: the master weights, their average,
each tensor of the optimizer. Nothing in it is executable. A run with another number of ranks, ep_size or ZeRO stage
reads the elements that it owns from whichever files hold them, and no others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpmoe.errors import CheckpointError, first_line
from sharpmoe.model.adapters import Adapters
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.weights import SafetensorsWriter, TensorSpec, check_finite
from sharpmoe.parallel.zero.build import Values
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.partitions import EMA, MASTER, Piece, kept_pieces

_FIX = "resume from another checkpoint"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint saves and restores."""

    engine: Engine
    ema: ShardEma
    model: Backbone  # the part of the engine's module that becomes live.safetensors and ema.safetensors
    origin: Mapping[str, str]  # identities of codec and text encoder, for the headers of both files
    frozen: Values | None = None  # source of the parameters that are not trained, whole; None where all are
    adapters: Adapters | None = None  # those of `model`, which weights files hold merged


class _Stored(NamedTuple):
    """Where consecutive elements of a parameter are stored."""

    path: Path
    place: int  # index of the first element in the whole parameter, flat
    numel: int


def state_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"state_rank{rank:05d}.safetensors"


def write_state(
    path: Path, pieces: Sequence[Piece], partitions: Mapping[str, Sequence[Tensor]], scalars: Mapping[str, float]
) -> None:
    """Write this rank's pieces of every kind of flat partitions, and the optimizer's state that is no tensor.

    Raises OSError. No communication.
    """
    parts = {
        f"{kind}/{piece.name}": flat[piece.part].narrow(0, piece.start, piece.numel)
        for kind, flat in partitions.items()
        for piece in kept_pieces(flat, pieces)
    }
    header = {"places": json.dumps({piece.name: piece.place for piece in pieces}), "facts": json.dumps(scalars)}
    specs = {name: TensorSpec(part.shape, part.dtype) for name, part in parts.items()}
    with SafetensorsWriter(path, specs, header) as writer:
        for name, part in parts.items():
            writer.write(name, part)


class StateReader:
    """The state files of all ranks of one checkpoint, read by element. A `SavedState` for `ShardedState.restore`."""

    def __init__(self, folder: Path) -> None:
        """Read every header. Raises CheckpointError."""
        self._stored: dict[str, list[_Stored]] = {}
        self._opened: tuple[Path, Any] | None = None  # the file read last: most pieces of a rank come from one file
        self.scalars: dict[str, float] = {}
        paths = sorted(folder.glob(state_file(0).replace("00000", "*")))
        if not paths:
            raise CheckpointError(f"{folder}: holds no {state_file(0)}; {_FIX}")
        for path in paths:
            self._read_header(path)

    @property
    def kinds(self) -> set[str]:
        """Kinds of partitions that were saved."""
        return {key.partition("/")[0] for key in self._stored}

    def piece(self, kind: str, name: str, place: int, count: int) -> Tensor:
        """Return elements [place, place + count) of a parameter, flat, as they were saved. Raises CheckpointError."""
        out: Tensor | None = None
        found = 0
        for stored in self._stored.get(f"{kind}/{name}", ()):
            first, last = max(place, stored.place), min(place + count, stored.place + stored.numel)
            if first >= last:
                continue
            part = self._slice(stored.path, f"{kind}/{name}", first - stored.place, last - stored.place)
            if kind in (MASTER, EMA):
                check_finite(f"{kind}/{name}", part, str(stored.path), "resume from an earlier checkpoint")
            out = part.new_empty(count) if out is None else out
            out[first - place : last - place] = part
            found += last - first
        if out is None or found != count:
            raise CheckpointError(f"{kind}/{name}: {found} of {count} elements found in the checkpoint; {_FIX}")
        return out

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                places = json.loads(header["places"])
                self.scalars = json.loads(header["facts"])
                for key in file.keys():  # noqa: SIM118
                    (count,) = file.get_slice(key).get_shape()
                    self._stored.setdefault(key, []).append(_Stored(path, places[key.partition("/")[2]], count))
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); {_FIX}") from error

    def _slice(self, path: Path, key: str, first: int, last: int) -> Tensor:
        try:
            if self._opened is None or self._opened[0] != path:
                self._opened = path, safe_open(path, framework="pt")
            part: Tensor = self._opened[1].get_slice(key)[first:last]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({first_line(error)}); {_FIX}") from error
        return part
