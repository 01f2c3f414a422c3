"""Ranks that keep an eye on each other: a dead, stopped or stuck one ends the others, and they say which one it was.

A thread of every rank beats in the store that the process group was made with. Rank 0 judges all beats and writes its
verdict there; the others judge rank 0 and the store itself. Nothing depends on the backend: under NCCL a collective
with a dead rank never returns, under gloo it fails with an address instead of a rank.
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

LOST = 3  # exit code of a rank that lost another one
_VERDICT = "verdict"
_INTERVAL = 0.3  # seconds between beats, at most
_FAREWELL = 5.0  # seconds that the others have to fail alike, or leave, after one of them has failed
_STOPPED = 2.0  # seconds that a thread oversleeps where its process was stopped: it cannot judge others by that time
# How gloo, NCCL and torch's store speak of a peer that is gone.
_LOSS_WORDS = ("gloo", "nccl", "connection", "timed out", "socket", "broken pipe")

HERE, LEFT, FAILED = "here", "left", "failed"

_marks = 0
_place = "the start"
_attempts = 0


class Beat(NamedTuple):
    """What one rank says of itself."""

    pulse: int  # grows for as long as the process runs
    marks: int  # places that its main thread has passed; comparable between ranks
    place: str  # the last of them that has a name
    state: str  # here, left (finished), failed
    where: str  # host and process


def mark(place: str | None = None) -> None:
    """Tell that the main thread has come so far, to a place that every rank passes in the same order."""
    global _marks, _place
    _marks += 1
    _place = place or _place


class Judge:
    """Beats over time to a verdict. Pure but for the clock that it is given."""

    def __init__(self, config: PeersConfig, now: float, judges_all: bool) -> None:
        self.config, self.judges_all = config, judges_all  # False: sees rank 0 and itself only
        self.beats: dict[int, Beat] = {}
        self.heard: dict[int, float] = {}  # when the pulse last grew
        self.failed: dict[int, float] = {}  # since when
        self.moved = now  # when the main thread of any rank last moved
        self.farewell = min(_FAREWELL, config.dead_after)

    def hear(self, beats: dict[int, Beat], now: float) -> None:
        """Take in the beats of some ranks."""
        for rank, beat in beats.items():
            before = self.beats.get(rank)
            if before is None or before.pulse != beat.pulse:
                self.heard[rank] = now
            if before is None or before.marks != beat.marks:
                self.moved = now
            if beat.state == FAILED:
                self.failed.setdefault(rank, now)
            self.beats[rank] = beat

    def forgive(self, now: float) -> None:
        """Start all clocks anew: this process itself was stopped for a while, and cannot know what others did."""
        self.heard = dict.fromkeys(self.heard, now)
        self.failed = dict.fromkeys(self.failed, now)
        self.moved = now

    def verdict(self, now: float) -> str:
        """Name the ranks that the run has lost; empty where it has lost none."""
        here = [rank for rank, beat in self.beats.items() if beat.state == HERE]
        silent = [rank for rank in here if now - self.heard[rank] > self.config.dead_after]
        if silent:
            return f"{self.names(silent)}: not heard of for {self.config.dead_after:g} s, dead or stopped"
        gone = [rank for rank, since in self.failed.items() if here and now - since > self.farewell]
        if gone:
            return f"{self.names(gone)}: ended with an error while others went on"
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
        """Ranks with their places."""
        told = [f"rank {rank} ({self.beats[rank].where}, last seen in {self.beats[rank].place})" for rank in ranks[:4]]
        return ", ".join(told) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


class Peers:
    """The two threads of one rank: one exchanges beats, one sees to it that the exchange itself does not hang."""

    def __init__(self, rank: int, size: int, config: PeersConfig) -> None:
        self.rank, self.config = rank, config
        self.watched = list(range(1, size)) if rank == 0 else [0]
        self.interval = min(_INTERVAL, config.dead_after / 10)
        self.state = self.told = HERE
        self.pulse = 0
        self.others_gone = False
        self.judge = Judge(config, time.monotonic(), judges_all=rank == 0)
        self.exchanged = time.monotonic()
        self.ending, self.leaving = threading.Event(), threading.Event()
        self.store = _connect()
        self._say()
        if rank == 0:
            self.store.set(_VERDICT, "")
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._guard)]

    def start(self) -> None:
        """Begin to beat and judge; after a barrier, so that every rank's first beat is there."""
        self.exchanged = time.monotonic()
        for thread in self.threads:
            thread.start()

    def leave(self, state: str) -> None:
        """Say goodbye and stop. Rank 0, which judges and may keep the store, waits until all others have."""
        self.state = state
        self.leaving.set()
        while self.told != state or (self.rank == 0 and not self.others_gone):
            time.sleep(0.01)
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def await_verdict(self) -> None:
        """After a collective has failed: the verdict ends this process. Returns where nobody turns out to be lost."""
        time.sleep(self.config.dead_after + 4 * self.interval)

    def _own(self) -> Beat:
        return Beat(self.pulse, _marks, _place, self.state, f"{socket.gethostname()}, process {os.getpid()}")

    def _say(self) -> None:
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
                    self.judge.forgive(now)
                last = now
                self._act(verdict or self.judge.verdict(now))
            self.told = state
            self.leaving.wait(self.interval)
            if self.leaving.is_set():
                time.sleep(0.02)

    def _beat(self) -> str:
        """Tell and hear once; returns the verdict that rank 0 has written, or nothing."""
        self._say()
        keys = [_VERDICT, *(f"beat/{rank}" for rank in self.watched)]
        verdict, *texts = (text.decode() for text in self.store.multi_get(keys))
        beats = {rank: Beat(*json.loads(text)) for rank, text in zip(self.watched, texts, strict=True)}
        self.judge.hear(beats | {self.rank: self._own()}, time.monotonic())
        self.others_gone = all(beat.state != HERE for beat in beats.values())
        return str(verdict)

    def _act(self, verdict: str) -> None:
        if not verdict:
            return
        if self.rank == 0:
            self.store.set(_VERDICT, verdict)
            time.sleep(2 * self.interval)  # the others read it before this process, which may keep the store, is gone
        if self.state == FAILED:
            self.others_gone = True  # no need to wait for them; this rank has an error of its own to tell
        else:
            self._end(verdict)

    def _guard(self) -> None:
        """End this process where the store has not answered for too long: a call of it may never return."""
        last = time.monotonic()
        while not self.ending.wait(self.interval):
            now = time.monotonic()
            if now - last > self.interval + _STOPPED:
                self.exchanged = now
            last = now
            if now - self.exchanged > self.config.dead_after + self.interval:
                keeper = self.judge.names([0]) if 0 in self.judge.beats else "rank 0"
                self._end(
                    f"{keeper}, or the launcher that keeps the store there: not heard of for "
                    f"{self.config.dead_after:g} s, dead or stopped"
                )

    def _end(self, verdict: str) -> None:
        sys.stderr.write(f"error: rank {self.rank}: {verdict}; start the run again to go on from its last checkpoint\n")
        sys.stderr.flush()
        os._exit(LOST)


@contextmanager
def watching(rank: int, size: int, config: PeersConfig) -> Iterator[None]:
    """Inside, a lost rank ends this process with exit code 3 and one line on stderr. Nothing in a world of one.

    Communicates: a barrier at the start; then through the store, from a thread. A clean end is never disturbed: a rank
    that has left is no longer missed.
    """
    if size == 1:
        yield
        return
    peers = Peers(rank, size, config)
    dist.barrier()
    peers.start()
    try:
        yield
    except BaseException as error:
        if _tells_of_a_loss(error):
            peers.await_verdict()
        peers.leave(FAILED)
        raise
    peers.leave(LEFT)


def _tells_of_a_loss(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective whose other end is gone."""
    if error is None or isinstance(error, dist.DistError):
        return error is not None
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOSS_WORDS):
        return True
    return _tells_of_a_loss(error.__cause__)


def _connect() -> dist.Store:
    """A connection of its own to the store of the process group: the main one may wait in it. New keys each time."""
    global _attempts
    _attempts += 1
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return dist.PrefixStore(f"peers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_attempts}", store)
