"""Save, verify and load a checkpoint, against torch.save and torch.load of the same tensors.

    python -m benchmarks.checkpoint [--wall] [--json FILE]

About 100 MB of one rank: float32 weights, both moments of AdamW and the EMA as flat partitions, and both weights files.
Ours is written, flushed, hashed, described by a manifest and renamed to its final name; when it is loaded, every file
is hashed before a tensor is read. The reference is one file, written and flushed; the limit writes and flushes, or
reads, as many plain bytes. Without --wall, processor time is counted, which excludes the time of the disk.
benchmarks.saving measures several ranks and training during a save.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Options, Planned, Work, main
from benchmarks.optimizer import ZERO3, run_for
from sharpmoe.checkpoint import manifest
from sharpmoe.checkpoint.manifest import Progress, RunIdentity
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.checkpoint.state import Contents
from sharpmoe.config import CheckpointConfig
from sharpmoe.model.build import build_model
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.partitions import make_states

_MODEL = {"width": 128, "depth": 6, "num_heads": 4, "num_experts": 8}


def cases(folder: Path, options: Options) -> Iterator[Planned]:
    """Yield saving, verifying and loading, of one set of files below `folder`."""
    made = cache(lambda: {case.name: case for case in built(folder, options)})
    for name in ("load.save", "load.verify", "load.verify_and_load"):
        yield Planned(name, lambda name=name: made()[name])  # type: ignore[misc]


def built(folder: Path, options: Options, fields: dict[str, object] | None = None) -> Iterator[Case]:
    """Yield saving, verifying and loading; files are written below `folder`."""
    contents = make_contents(fields or dict(_MODEL), options)
    writer, plain = Ours(folder, contents), Plain(folder, contents)
    writer.save()
    plain.save()
    size = sum(file.stat().st_size for file in writer.saved.rglob("*") if file.is_file())
    rates = {"bytes": float(size)}
    write, read = partial(write_bytes, folder / "plain", size), partial(read_bytes, folder / "plain")
    yield Case("load.save", once(writer.save), once(plain.save), once(write), rates=rates)
    yield Case("load.verify", once(lambda: manifest.verify_checkpoint(writer.saved)), limit=once(read), rates=rates)
    check = partial(check_round_trip, contents, writer)
    yield Case("load.verify_and_load", once(writer.load), once(plain.load), once(read), check=check, rates=rates)


def make_contents(fields: dict[str, object], options: Options) -> Contents:
    """Return an engine of one rank with moments that are not zero."""
    world, run = launch.start(), run_for(fields, options)
    torch.manual_seed(0)
    model = build_model(run.model)
    engine = Engine(model, run, resolve_ds_config(ZERO3, run, world.size), world)
    make_states(engine._zero.optimizer, engine.state.masters(), engine.state._owners())
    for parts in engine.state.partitions().values():
        for part in parts:
            part.detach().normal_()
    return Contents(engine=engine, ema=ShardEma(engine, 0.9), model=model, origin={})


class Ours:
    """Checkpoints of this project, each replacing the one before."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.contents, self.saved = contents, folder
        run = run_for({}, Options(torch.device("cpu"), torch.float32, "fp32"))
        config, identity = CheckpointConfig(asynchronous=False), RunIdentity.of(run, "none")
        self.checkpoints = Checkpoints(folder / "ours", config, contents, identity=identity, settings={})

    def save(self) -> None:
        """Write a checkpoint and wait for it."""
        self.saved = self.checkpoints.save(Progress(1, 0))

    def load(self) -> None:
        """Verify every file and load it into the engine."""
        self.checkpoints.load(manifest.verify_checkpoint(self.saved))


class Plain:
    """The same tensors in one file of torch.save."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.path, self.contents = folder / "plain.pt", contents

    def save(self) -> None:
        """Write and flush."""
        engine, ema, model = self.contents.engine, self.contents.ema, self.contents.model
        weights = {"live": engine.full_weights(model), "ema": ema.full_weights(model)}
        torch.save({"partitions": self._partitions(), "weights": weights}, self.path)
        flush(self.path)

    def load(self) -> None:
        """Read the file and load it into the engine."""
        read = torch.load(self.path, weights_only=True, map_location="cpu")["partitions"]
        for kind, parts in self._partitions().items():
            for part, value in zip(parts, read[kind], strict=True):
                part.detach().copy_(value)
        self.contents.engine.state.refresh_weights()

    def _partitions(self) -> dict[str, list[Tensor]]:
        found = {**self.contents.engine.state.partitions(), "ema": self.contents.ema.shards}
        return {kind: [part.detach() for part in parts] for kind, parts in found.items()}


def check_round_trip(contents: Contents, ours: Ours) -> None:
    """Assert that a loaded checkpoint equals the saved one bit for bit."""
    parts = [
        part.detach() for own in (*contents.engine.state.partitions().values(), contents.ema.shards) for part in own
    ]
    before = [part.clone() for part in parts]
    for part in parts:
        part.zero_()
    ours.load()
    assert all(torch.equal(part, value) for part, value in zip(parts, before, strict=True))


def write_bytes(path: Path, size: int) -> None:
    """Write and flush."""
    path.write_bytes(bytes(size))
    flush(path)


def read_bytes(path: Path) -> None:
    """Read a whole file."""
    path.read_bytes()


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def once(action: Callable[[], object]) -> Work:
    """Return work that calls a function once."""

    def work() -> int:
        action()
        return 1

    return work


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(lambda options: cases(Path(scratch), options), __doc__.splitlines()[0]))
