"""Writing checkpoints beside the training: copy to the host, then a thread writes, agrees and publishes.

A checkpoint is written to a hidden folder: every rank's pieces, both weights files, each flushed and hashed into the
manifest. Then the folder is renamed to step<N>, and only then does `latest` name it. Whatever ends before leaves the
former checkpoint as it was.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sharpmoe import durable
from sharpmoe.checkpoint import manifest, retention, rng, snapshot, weights
from sharpmoe.checkpoint.manifest import Entry, Layout, Manifest, Progress
from sharpmoe.checkpoint.snapshot import Contents, Snapshot
from sharpmoe.checkpoint.state import state_file, write_state
from sharpmoe.config import CheckpointConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import weight_specs, weights_writer
from sharpmoe.parallel.ranks.background import HostCopies, SideGroup

_NICENESS = 10  # of the thread that writes: on a host without cores to spare, training comes first


class Facts(NamedTuple):
    """What a manifest tells beside the files; the same on every rank."""

    layout: Layout
    settings: Mapping[str, Any]


class Outcome(NamedTuple):
    """What became of one save; the same on every rank but for the seconds."""

    progress: Progress
    folder: Path
    stalled: float  # seconds that training waited
    seconds: float  # until it was published, or given up
    error: CheckpointError | None  # None: it is on the disk


class Saver:
    """Writes the checkpoints of one run, one at a time. Made and used by every rank alike."""

    def __init__(self, root: Path, facts: Facts, contents: Contents, config: CheckpointConfig) -> None:
        """Make the process group of the thread. Communicates."""
        self._root, self._facts, self._contents, self._config = root, facts, contents, config
        self._peers = SideGroup(contents.engine.world)
        self._specs = weight_specs(contents.model.config)
        self._copies = HostCopies()
        self._running: Future[Outcome] | None = None

    def begin(self, progress: Progress) -> Outcome | None:
        """Copy the state to the host and start writing; returns what became of the save before, where there was one.

        Communicates. Waits for the save before, whose copies it overwrites, and, where the run is to save without a
        thread, for this one.
        """
        before = self.wait()
        began = time.monotonic()
        taken = snapshot.take(progress, self._contents, self._copies)
        running: Future[Outcome] = Future()
        stalled = time.monotonic() - began
        thread = threading.Thread(
            target=self._run, args=(running, taken, stalled), name=f"save step {progress.step}", daemon=True
        )
        thread.start()
        self._running = running
        if not self._config.asynchronous:
            thread.join()
            self._copies = HostCopies()  # gives the memory back
        return before

    def ended(self) -> Outcome | None:
        """What became of a save that ended since it was last asked, without waiting. No communication."""
        return self.wait() if self._running is not None and self._running.done() else None

    def wait(self) -> Outcome | None:
        """Wait for the save under way; None where there is none."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint and wait for it. Communicates; raises CheckpointError on every rank where it fails."""
        self.begin(progress)
        outcome = self.wait()
        assert outcome is not None
        if outcome.error is not None:
            raise outcome.error
        return outcome.folder

    def _run(self, running: "Future[Outcome]", taken: Snapshot, stalled: float) -> None:
        """Body of the thread: its end, good or bad, is the Future's."""
        with suppress(OSError, AttributeError):  # no such call, or not allowed: at the priority of all
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        began = time.monotonic()
        final = self._root / retention.folder_name(taken.progress.step)
        try:
            error = self._attempt(taken, final)
            running.set_result(Outcome(taken.progress, final, stalled, stalled + time.monotonic() - began, error))
        except BaseException as error:  # noqa: BLE001 (handed to the thread that trains)
            running.set_exception(error)

    def _attempt(self, taken: Snapshot, final: Path) -> CheckpointError | None:
        draft = final.with_name(f".{final.name}.partial")
        try:
            self._write(taken, draft, final)
        except CheckpointError as error:
            if self._peers.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
            return error
        return None

    def _write(self, taken: Snapshot, draft: Path, final: Path) -> None:
        """Write everything to `draft` and publish it. Communicates; CheckpointError on every rank."""
        peers, is_main = self._peers, self._peers.world.is_main
        need = sum(peers.gather(taken.num_bytes))
        with peers.raise_on_all_ranks():
            if is_main:
                with retention.disk_errors(self._root):
                    retention.check_room(self._root, need)
                    durable.fresh_folder(draft)
        mine: list[str] = []
        with peers.raise_on_all_ranks():
            mine = _write_own(taken, draft, peers.world.rank)
        mine += self._write_weights(taken, draft)
        entries: dict[str, Entry] = {}
        with peers.raise_on_all_ranks():
            for name in mine:
                with retention.disk_errors(draft / name):
                    entries[name] = _seal_file(draft / name)
        files = {name: entry for part in peers.gather(entries) for name, entry in part.items()}
        with peers.raise_on_all_ranks():
            if is_main:
                with retention.disk_errors(final):
                    self._publish(taken.progress, draft, final, files)

    def _write_weights(self, taken: Snapshot, draft: Path) -> list[str]:
        """Write live.safetensors and ema.safetensors on rank 0; returns the names of this rank's files."""
        table = weights.gather_table(taken.pieces, self._peers)
        names = []
        for name, kind in snapshot.WEIGHTS.items():
            names.append(f"{name}.safetensors")
            parts = taken.partitions[kind]
            tensors = weights.whole_tensors(self._specs, table, parts, taken.buffers, self._peers)
            self._write_whole(draft / names[-1], name, taken.progress, tensors)
        return names if self._peers.world.is_main else []

    def _write_whole(
        self, path: Path, kind: str, progress: Progress, tensors: Iterator[tuple[str, Tensor | None]]
    ) -> None:
        """Write what rank 0 is handed, one tensor at a time; the other ranks only send."""
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
                            writer.write(name, tensor)
            finally:
                for _ in tensors:  # where writing failed: the other ranks still send
                    pass

    def _publish(self, progress: Progress, draft: Path, final: Path, files: dict[str, Entry]) -> None:
        """Complete the folder, give it its name, point `latest` at it, drop old ones."""
        layout, settings = self._facts
        manifest.write(Manifest(draft, progress, layout, self._contents.model.config, dict(settings), files))
        durable.flush_tree(draft)
        durable.publish_folder(draft, final)
        durable.write_atomically(self._root / retention.LATEST, final.name)
        retention.drop_old(self._root, final, self._config)


def _write_own(taken: Snapshot, draft: Path, rank: int) -> list[str]:
    """Write the files that are this rank's alone; returns their names. Raises CheckpointError."""
    names = [state_file(rank), snapshot.generators_file(rank)]
    pieces, partitions, facts = taken.pieces, taken.partitions, taken.facts
    with retention.disk_errors(draft / names[0]):
        write_state(draft / names[0], pieces, partitions, facts)
    with retention.disk_errors(draft / names[1]):
        rng.write(draft / names[1], taken.generators)
    return names


def _seal_file(path: Path) -> Entry:
    """Flush a file and hash it."""
    durable.flush_file(path)
    return manifest.entry(path)
