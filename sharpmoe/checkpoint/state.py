"""A rank's part of the training state in one safetensors file, readable in any other layout.

state_rank00000.safetensors holds KIND/PARAMETER for each piece this rank owns: the master weights, their average, each
tensor of the optimizer. Nothing in it is executable. A run with other ranks, another ep_size or another ZeRO stage
reads the elements it owns, wherever they were written, and never more than those.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import SafetensorsWriter, TensorSpec
from sharpmoe.parallel.zero.partitions import Piece

_MEND = "resume from another checkpoint"


class Kept(NamedTuple):
    """Where a run of a parameter's elements was written."""

    path: Path
    place: int  # of its first element in the whole parameter, flat
    numel: int


def state_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"state_rank{rank:05d}.safetensors"


def write_state(
    path: Path, pieces: Sequence[Piece], partitions: Mapping[str, Sequence[Tensor]], facts: Mapping[str, Any]
) -> None:
    """Write this rank's pieces of every kind of flat partitions, and what of the optimizer is no tensor (`facts`).

    Raises OSError. No communication.
    """
    parts = {
        f"{kind}/{piece.name}": flat[piece.part].narrow(0, piece.start, piece.numel)
        for kind, flat in partitions.items()
        for piece in pieces
    }
    header = {"places": json.dumps({piece.name: piece.place for piece in pieces}), "facts": json.dumps(facts)}
    planned = {name: TensorSpec(part.shape, part.dtype) for name, part in parts.items()}
    with SafetensorsWriter(path, planned, header) as writer:
        for name, part in parts.items():
            writer.write(name, part)


def fill_partitions(partitions: Mapping[str, Sequence[Tensor]], pieces: Sequence[Piece], reader: "StateReader") -> None:
    """Read this rank's pieces of every kind into its flat partitions, in place. Raises CheckpointError."""
    for kind, flat in partitions.items():
        for piece in pieces:
            value = reader.piece(kind, piece.name, piece.place, piece.numel)
            flat[piece.part].narrow(0, piece.start, piece.numel).copy_(value)


class StateReader:
    """All ranks' files of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read every header. Raises CheckpointError."""
        self._kept: dict[str, list[Kept]] = {}
        self._opened: tuple[Path, Any] | None = None  # the last file: a rank's pieces mostly come from one
        self.facts: dict[str, Any] = {}
        paths = sorted(folder.glob(state_file(0).replace("00000", "*")))
        if not paths:
            raise CheckpointError(f"{folder}: holds no {state_file(0)}; {_MEND}")
        for path in paths:
            self._read_header(path)

    @property
    def kinds(self) -> set[str]:
        """Kinds of partitions that were written."""
        return {key.partition("/")[0] for key in self._kept}

    def piece(self, kind: str, name: str, place: int, count: int) -> Tensor:
        """Elements [place, place + count) of a parameter, flat, as they were written. Raises CheckpointError."""
        out: Tensor | None = None
        found = 0
        for kept in self._kept.get(f"{kind}/{name}", ()):
            first, last = max(place, kept.place), min(place + count, kept.place + kept.numel)
            if first >= last:
                continue
            run = self._slice(kept.path, f"{kind}/{name}", first - kept.place, last - kept.place)
            out = run.new_empty(count) if out is None else out
            out[first - place : last - place] = run
            found += last - first
        if out is None or found != count:
            raise CheckpointError(f"{kind}/{name}: {found} of {count} elements found in the checkpoint; {_MEND}")
        return out

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                places = json.loads(header["places"])
                self.facts = json.loads(header["facts"])
                for key in file.keys():  # noqa: SIM118
                    (count,) = file.get_slice(key).get_shape()
                    self._kept.setdefault(key, []).append(Kept(path, places[key.partition("/")[2]], count))
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {_MEND}") from error

    def _slice(self, path: Path, key: str, first: int, last: int) -> Tensor:
        try:
            if self._opened is None or self._opened[0] != path:
                self._opened = path, safe_open(path, framework="pt")
            run: Tensor = self._opened[1].get_slice(key)[first:last]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {_MEND}") from error
        return run
