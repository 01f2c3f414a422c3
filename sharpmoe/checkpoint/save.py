"""The checkpoints of a run: what the trainer calls to save and load, and saving while training goes on.

A save copies the state to the host between two steps; then a thread writes it to a hidden folder: every rank's pieces
and both weights files, each flushed and hashed into the manifest; weights that are not finite are an error. When all
files are on the disk, the folder is renamed to step<N>, and then `latest` is set to it. If a run ends before that, the
previous checkpoint is still valid.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpmoe import durable
from sharpmoe.checkpoint import load, retention
from sharpmoe.checkpoint.adapters import read_adapters
from sharpmoe.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Progress,
    RunIdentity,
    file_entry,
    write_manifest,
)
from sharpmoe.checkpoint.rng import generator_states, generators_file, write_generators
from sharpmoe.checkpoint.state import Contents, state_file, write_state
from sharpmoe.checkpoint.weights import gather_table, whole_tensors
from sharpmoe.config import CheckpointConfig, ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.adapters import plain_name
from sharpmoe.model.weights import check_finite, weight_specs, weights_writer
from sharpmoe.parallel.ranks.background import HostCopies, SideGroup
from sharpmoe.parallel.zero.partitions import EMA, MASTER, Partitions, Piece

_NICENESS = 10  # of the thread that writes: on a host without idle cores, training has priority
_NOT_FINITE = "lower optim.lr, and go on from an earlier checkpoint or start again"
_WEIGHTS = {"live": MASTER, "ema": EMA}  # weights files -> the kind of partitions that they are assembled from


class Outcome(NamedTuple):
    """The result of one save; the same on every rank, except for the seconds."""

    progress: Progress
    folder: Path
    stalled: float  # seconds for which training waited
    seconds: float  # until it was published, or failed
    error: CheckpointError | None  # None: the checkpoint is on the disk


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """Host copies of one rank's state at one step. Valid until the next is taken."""

    progress: Progress
    partitions: Partitions  # masters, EMA and each tensor of the optimizer
    pieces: list[Piece]  # where the model's parameters lie in the partitions
    scalars: dict[str, float]  # the optimizer's state other than tensors, such as its step count
    generators: dict[str, Any]
    buffers: dict[str, Tensor]  # of the model, equal on every rank
    num_bytes: int  # that the tensors of this rank will take in all files, those that rank 0 writes included


class Checkpoints:
    """The checkpoints of one run. Every rank creates one and makes the same calls; one save runs at a time.

    Before there is a model, `find`, `check_fits` and `first_sound` say which checkpoint the run resumes.
    `rehearse_resume`, `size`, `free_bytes` and `check_room` change nothing.
    """

    find = staticmethod(load.find_checkpoints)
    check_fits = staticmethod(load.check_fits)
    check_trains_same = staticmethod(load.check_trains_same)
    read_adapters = staticmethod(read_adapters)
    first_sound = staticmethod(load.first_sound)
    rehearse_resume = staticmethod(load.rehearse_resume)
    check_room = staticmethod(retention.check_room)
    free_bytes = staticmethod(retention.free_bytes)
    is_milestone = staticmethod(retention.is_milestone)
    kept_best = staticmethod(retention.kept_best)

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        contents: Contents,
        *,
        identity: RunIdentity,
        settings: Mapping[str, Any],
    ) -> None:
        """Create the process group of the saving thread. Communicates.

        root: the folder of all checkpoints of the run. settings: for the manifest (rank 0 writes it).
        """
        self._root, self._config, self._contents = root, config, contents
        self._identity, self._settings = identity, settings
        self._peers = SideGroup(contents.engine.world)
        self._specs = weight_specs(contents.model.config)
        frozen = [plain_name(name) for name, each in contents.model.named_parameters() if not each.requires_grad]
        self._frozen_bytes = sum(self._specs[name].num_bytes for name in frozen)
        self._copies = HostCopies()
        self._running: Future[Outcome] | None = None

    @staticmethod
    def size(model: ModelConfig, optimizer: int, trained: int | None = None) -> int:
        """Return the bytes of tensors of one checkpoint. optimizer: bytes of the optimizer's states.

        trained: elements that are trained; None: all.
        """
        elements = sum(spec.shape.numel() for spec in weight_specs(model).values())
        state = (elements if trained is None else trained) * 2  # masters, average
        return torch.float32.itemsize * (state + elements * len(_WEIGHTS)) + optimizer

    def load(self, saved: Manifest) -> None:
        """Load the state of a checkpoint that is intact and fits the run. Communicates; see `load_checkpoint`."""
        load.load_checkpoint(saved, self._contents)

    def begin(self, progress: Progress) -> Outcome | None:
        """Copy the state to the host and start writing it. Communicates.

        Waits for the previous save, whose host copies it overwrites, and, if checkpoint.asynchronous is false, for
        this one. Returns the outcome of the previous save if it has not been taken yet; look at its error.
        """
        before = self.wait()
        began = time.monotonic()
        taken = _take_snapshot(progress, self._contents, self._copies)
        running: Future[Outcome] = Future()
        stalled = time.monotonic() - began
        thread = threading.Thread(
            target=self._run, args=(running, taken, stalled), name=f"save step {progress.step}", daemon=True
        )
        thread.start()
        self._running = running
        if not self._config.asynchronous:
            thread.join()
            self._copies = HostCopies()  # frees the memory
        return before

    def take_finished(self) -> Outcome | None:
        """Take the outcome of a finished save; None if none has finished or its outcome was taken. Does not wait.

        No communication.
        """
        return self.wait() if self._running is not None and self._running.done() else None

    def wait(self) -> Outcome | None:
        """Wait for the running save and take its outcome; None if there is none or it was taken."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def save(self, progress: Progress) -> Path:
        """Save and wait; return the folder. Communicates. If the save fails, raises CheckpointError on every rank.

        Take the outcome of an earlier save (`wait`) before: it would be lost here.
        """
        assert self._running is None, "Checkpoints.save: call wait() first and look at the outcome of the earlier save"
        self.begin(progress)
        outcome = self.wait()
        assert outcome is not None
        if outcome.error is not None:
            raise outcome.error
        return outcome.folder

    def drop_old(self, newest: Path) -> None:
        """Keep what is to be kept beside the newest checkpoint, which was measured after it was saved. Communicates.

        Raises CheckpointError on every rank.
        """
        with self._peers.raise_on_all_ranks():
            if self._peers.world.is_main:
                with retention.disk_errors(self._root):
                    retention.drop_old(self._root, newest, self._config)

    def _run(self, running: "Future[Outcome]", taken: _Snapshot, stalled: float) -> None:
        """Write a snapshot, in the thread of the save; the result, or any exception, goes to the Future `running`."""
        with suppress(OSError, AttributeError):  # no such call, or not permitted: the priority stays
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        began = time.monotonic()
        final = self._root / retention.folder_name(taken.progress.step)
        draft = final.with_name(f".{final.name}.partial")
        failure: CheckpointError | None = None
        try:
            try:
                self._write(taken, draft, final)
            except CheckpointError as error:
                failure = error
                if self._peers.world.is_main:
                    shutil.rmtree(draft, ignore_errors=True)
            running.set_result(Outcome(taken.progress, final, stalled, stalled + time.monotonic() - began, failure))
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that trains)
            running.set_exception(error)

    def _write(self, taken: _Snapshot, draft: Path, final: Path) -> None:
        """Write everything to `draft` and publish it. Communicates; raises CheckpointError on every rank."""
        peers, is_main = self._peers, self._peers.world.is_main
        need = sum(peers.gather(taken.num_bytes)) + len(_WEIGHTS) * self._frozen_bytes
        with peers.raise_on_all_ranks():
            if is_main:
                with retention.disk_errors(self._root):
                    retention.check_room(self._root, 1, need)
                    durable.fresh_folder(draft)
        mine: list[str] = []
        with peers.raise_on_all_ranks():
            mine = _write_own(taken, draft, peers.world.rank)
        mine += self._write_weights(taken, draft)
        entries: dict[str, FileEntry] = {}
        with peers.raise_on_all_ranks():
            for name in mine:
                with retention.disk_errors(draft / name):
                    durable.flush_file(draft / name)
                    entries[name] = file_entry(draft / name)
        files = {name: entry for part in peers.gather(entries) for name, entry in part.items()}
        with peers.raise_on_all_ranks():
            if is_main:
                with retention.disk_errors(final):
                    self._publish(taken.progress, draft, final, files)

    def _write_weights(self, taken: _Snapshot, draft: Path) -> list[str]:
        """Write live.safetensors and ema.safetensors on rank 0; return the names of the files of this rank."""
        table = gather_table(taken.pieces, self._peers)
        names = []
        for name, kind in _WEIGHTS.items():
            names.append(f"{name}.safetensors")
            parts = taken.partitions[kind]
            tensors = whole_tensors(self._specs, table, parts, taken.buffers, self._contents, self._peers)
            self._write_whole(draft / names[-1], name, taken.progress, tensors)
        return names if self._peers.world.is_main else []

    def _write_whole(
        self, path: Path, kind: str, progress: Progress, tensors: Iterator[tuple[str, Tensor | None]]
    ) -> None:
        """Write one tensor after the other on rank 0; the other ranks only send."""
        model, is_main = self._contents.model.config, self._peers.world.is_main
        meta = {"step": str(progress.step), "samples": str(progress.samples), "weights": kind, **self._contents.origin}
        with self._peers.raise_on_all_ranks():
            try:
                with (
                    retention.disk_errors(path),
                    weights_writer(path, self._specs, model, meta) if is_main else nullcontext() as writer,
                ):
                    for name, tensor in tensors:
                        if writer is not None and tensor is not None:
                            check_finite(name, tensor, f"{self._root}: step {progress.step} is not saved", _NOT_FINITE)
                            writer.write(name, tensor)
            finally:
                for _ in tensors:  # after a failed write the other ranks still send
                    pass

    def _publish(self, progress: Progress, draft: Path, final: Path, files: dict[str, FileEntry]) -> None:
        """Complete the folder, rename it to `final`, set `latest` to it, remove old checkpoints."""
        manifest = Manifest(
            folder=draft,
            progress=progress,
            identity=self._identity,
            model=self._contents.model.config,
            settings=dict(self._settings),
            files=files,
            saved=time.time(),
        )
        write_manifest(manifest)
        durable.flush_tree(draft)
        durable.publish_folder(draft, final)
        durable.write_atomically(self._root / retention.LATEST, final.name)
        retention.drop_old(self._root, final, self._config)


def _take_snapshot(progress: Progress, contents: Contents, copies: HostCopies) -> _Snapshot:
    """Copy this rank's state to the host, between two steps. No communication.

    Costs host memory: a second copy of the rank's masters, EMA and optimizer state.
    """
    engine, ema, model = contents.engine, contents.ema, contents.model
    copies.start()
    own = {**engine.state.partitions(), EMA: ema.shards}
    partitions = {kind: [copies.tensor(part) for part in parts] for kind, parts in own.items()}
    buffers = {name: copies.tensor(buffer) for name, buffer in model.named_buffers()}
    pieces = engine.state.pieces(model)
    elements = sum(piece.numel for piece in pieces)
    # Each element is in this rank's state file once per kind of partition, and once in each weights file.
    stored = elements * (len(partitions) + len(_WEIGHTS))
    copies.finish()
    return _Snapshot(
        progress=progress,
        partitions=partitions,
        pieces=pieces,
        scalars=engine.state.scalars(),
        generators=generator_states(),
        buffers=buffers,
        num_bytes=torch.float32.itemsize * stored,  # partitions and weights files are float32
    )


def _write_own(taken: _Snapshot, draft: Path, rank: int) -> list[str]:
    """Write the two files of this rank; return their names. Raises CheckpointError."""
    state, generators = state_file(rank), generators_file(rank)
    with retention.disk_errors(draft / state):
        write_state(draft / state, taken.pieces, taken.partitions, taken.scalars)
    with retention.disk_errors(draft / generators):
        write_generators(draft / generators, taken.generators)
    return [state, generators]
