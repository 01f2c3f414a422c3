"""Detect lost ranks: when one is dead, stopped or stuck, the others end and say which one it was.

A thread of every rank writes heartbeats to the store of the process group. Rank 0 judges all heartbeats and writes its
verdict to the store; the others judge rank 0 and the store itself. This works the same with every backend: under NCCL a
collective with a dead rank never returns, under gloo it fails with an address instead of a rank.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from sharpmoe.config import PeersConfig

LOST = 3  # exit code of a rank that has lost another one
_VERDICT = "verdict"
_INTERVAL = 0.3  # seconds between heartbeats, at most
_FAREWELL = 5.0  # seconds in which the others may fail alike, or leave, after one of them has failed
_STOPPED = 2.0  # seconds by which a thread oversleeps when its process was stopped: it cannot judge others by that time
# Words with which gloo, NCCL and torch's store report a lost rank.
_LOSS_WORDS = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe")

_HERE, _LEFT, _FAILED = "here", "left", "failed"

_marks = 0
_place = "the start"
_attempts = 0


class _Beat(NamedTuple):
    """The heartbeat of one rank."""

    pulse: int  # grows as long as the process runs
    marks: int  # calls of `mark` so far; comparable between ranks
    place: str  # the name of the last one that has a name
    state: str  # here, left (finished), failed
    where: str  # host and process


def mark(place: str | None = None) -> None:
    """Record the progress of the main thread. Every rank calls it at the same places in the same order."""
    global _marks, _place
    _marks += 1
    _place = place or _place


class _Judge:
    """Turn heartbeats over time into a verdict. Pure: the caller passes the time."""

    def __init__(self, config: PeersConfig, now: float, judges_all: bool) -> None:
        self.config, self.judges_all = config, judges_all  # False: sees rank 0 and itself only
        self.beats: dict[int, _Beat] = {}
        self.heard: dict[int, float] = {}  # time at which the pulse last grew
        self.failed: dict[int, float] = {}  # time of the first failed heartbeat
        self.moved = now  # time at which the main thread of any rank last moved
        self.farewell = min(_FAREWELL, config.dead_after)

    def hear(self, beats: dict[int, _Beat], now: float) -> None:
        """Record the heartbeats of some ranks."""
        for rank, beat in beats.items():
            before = self.beats.get(rank)
            if before is None or before.pulse != beat.pulse:
                self.heard[rank] = now
            if before is None or before.marks != beat.marks:
                self.moved = now
            if beat.state == _FAILED:
                self.failed.setdefault(rank, now)
            self.beats[rank] = beat

    def restart_clocks(self, now: float) -> None:
        """Start all clocks again: this process itself was stopped for a while and cannot know what others did."""
        self.heard = dict.fromkeys(self.heard, now)
        self.failed = dict.fromkeys(self.failed, now)
        self.moved = now

    def verdict(self, now: float) -> str:
        """Name the ranks that the run has lost; empty if it has lost none."""
        here = [rank for rank, beat in self.beats.items() if beat.state == _HERE]
        silent = [rank for rank in here if now - self.heard[rank] > self.config.dead_after]
        if silent:
            return f"{self.names(silent)}: no heartbeat for {self.config.dead_after:g} s, dead or stopped"
        gone = [rank for rank, since in self.failed.items() if here and now - since > self.farewell]
        if gone:
            return f"{self.names(gone)}: ended with an error while others continued"
        if self.judges_all and here and now - self.moved > self.config.stuck_after:
            return self._stuck(here)
        return ""

    def _stuck(self, here: Sequence[int]) -> str:
        fewest = min(self.beats[rank].marks for rank in here)
        behind = [rank for rank in here if self.beats[rank].marks == fewest]
        words = f"no rank has moved for {self.config.stuck_after:g} s"
        if len(behind) == len(here):
            return f"{words}, all at the same place ({self.beats[here[0]].place}); a collective between them hangs"
        return f"{self.names(behind)}: stuck, the others wait for it; {words}"

    def names(self, ranks: Sequence[int]) -> str:
        """Describe ranks by number, host and last place."""
        named = [f"rank {rank} ({self.beats[rank].where}, last seen in {self.beats[rank].place})" for rank in ranks[:4]]
        return ", ".join(named) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


class _Peers:
    """The two threads of one rank: one exchanges heartbeats, the other checks that the exchange does not hang."""

    def __init__(self, rank: int, size: int, config: PeersConfig) -> None:
        self.rank, self.config = rank, config
        self.watched = list(range(1, size)) if rank == 0 else [0]
        self.interval = min(_INTERVAL, config.dead_after / 10)
        self.state = self.announced = _HERE
        self.pulse = 0
        self.others_gone = False
        self.judge = _Judge(config, time.monotonic(), judges_all=rank == 0)
        self.exchanged = time.monotonic()
        self.ending, self.leaving = threading.Event(), threading.Event()
        self.store = connect("peers")
        self._publish_own()
        if rank == 0:
            self.store.set(_VERDICT, "")
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._guard)]

    def start(self) -> None:
        """Start both threads; call it after a barrier, so that every rank's first heartbeat exists."""
        self.exchanged = time.monotonic()
        for thread in self.threads:
            thread.start()

    def leave(self, state: str) -> None:
        """Announce the end and stop. Rank 0, which judges and may host the store, waits until all others have left."""
        self.state = state
        self.leaving.set()
        while self.announced != state or (self.rank == 0 and not self.others_gone):
            time.sleep(0.01)
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def await_verdict(self) -> None:
        """Wait after a failed collective: a verdict ends this process. Returns if no rank turns out to be lost."""
        time.sleep(self.config.dead_after + 4 * self.interval)

    def _own(self) -> _Beat:
        return _Beat(self.pulse, _marks, _place, self.state, f"{socket.gethostname()}, process {os.getpid()}")

    def _publish_own(self) -> None:
        self.pulse += 1
        self.store.set(f"beat/{self.rank}", json.dumps(self._own()))

    def _exchange(self) -> None:
        last = time.monotonic()
        while not self.ending.is_set():
            state = self.state
            with suppress(RuntimeError):  # of the store: `_guard` counts the time
                verdict = self._beat()
                now = self.exchanged = time.monotonic()
                if now - last > self.interval + _STOPPED:
                    self.judge.restart_clocks(now)
                last = now
                self._act(verdict or self.judge.verdict(now))
            self.announced = state
            self.leaving.wait(self.interval)
            if self.leaving.is_set():
                time.sleep(0.02)

    def _beat(self) -> str:
        """Exchange heartbeats once; return the verdict that rank 0 has written, or an empty string."""
        self._publish_own()
        keys = [_VERDICT, *(f"beat/{rank}" for rank in self.watched)]
        verdict, *texts = (text.decode() for text in self.store.multi_get(keys))
        beats = {rank: _Beat(*json.loads(text)) for rank, text in zip(self.watched, texts, strict=True)}
        self.judge.hear(beats | {self.rank: self._own()}, time.monotonic())
        self.others_gone = all(beat.state != _HERE for beat in beats.values())
        return str(verdict)

    def _act(self, verdict: str) -> None:
        if not verdict:
            return
        if self.rank == 0:
            self.store.set(_VERDICT, verdict)
            time.sleep(2 * self.interval)  # the others read it before this process, which may host the store, ends
        if self.state == _FAILED:
            self.others_gone = True  # do not wait for them; this rank has an error of its own to report
        else:
            self._end(verdict)

    def _guard(self) -> None:
        """End this process when the store has not answered for too long: a call to it may never return."""
        last = time.monotonic()
        while not self.ending.wait(self.interval):
            now = time.monotonic()
            if now - last > self.interval + _STOPPED:
                self.exchanged = now
            last = now
            if now - self.exchanged > self.config.dead_after + self.interval:
                store_host = self.judge.names([0]) if 0 in self.judge.beats else "rank 0"
                self._end(
                    f"{store_host}, or the launcher that hosts the store there: no answer for "
                    f"{self.config.dead_after:g} s, dead or stopped"
                )

    def _end(self, verdict: str) -> None:
        sys.stderr.write(f"error: rank {self.rank}: {verdict}; start the run again to resume its last checkpoint\n")
        sys.stderr.flush()
        os._exit(LOST)


@contextmanager
def watching(rank: int, size: int, config: PeersConfig) -> Iterator[None]:
    """Within the context, a lost rank ends this process with exit code 3 and one line on stderr.

    Communicates: a barrier at the start, then through the store, from a thread; nothing in a world of one. A clean end
    is never disturbed: no heartbeat is expected from a rank that has left.
    """
    if size == 1:
        yield
        return
    peers = _Peers(rank, size, config)
    dist.barrier()
    peers.start()
    try:
        yield
    except BaseException as error:
        if _is_loss(error):
            peers.await_verdict()
        peers.leave(_FAILED)
        raise
    peers.leave(_LEFT)


def _is_loss(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective with a lost rank."""
    if error is None or isinstance(error, dist.DistError):
        return error is not None
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOSS_WORDS):
        return True
    return _is_loss(error.__cause__)


def connect(purpose: str, patience: float = 60.0) -> dist.Store:
    """Connect to the store of the process group again, as the first connection may be waiting. New keys each time.

    patience: seconds that a read waits for its keys.
    """
    global _attempts
    _attempts += 1
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience))
    return dist.PrefixStore(f"{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_attempts}", store)
