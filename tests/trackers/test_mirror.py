"""A tracker in a thread: what fails or hangs there costs figures, never the run."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from sharpmoe.trackers import mirror
from sharpmoe.trackers.mirror import MirroredTracker


class Listener:
    """A tracker that remembers its figures, and may fail or hang."""

    def __init__(self, broken: set[int] = frozenset(), hold: threading.Event | None = None) -> None:  # type: ignore[assignment]
        self.broken, self.hold = broken, hold
        self.steps: list[int] = []
        self.closed = False

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        if self.hold is not None:
            self.hold.wait(20)
        if step in self.broken:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def image(self, step: int, tag: str, pixels: Any) -> None: ...

    def text(self, step: int, tag: str, text: str) -> None: ...

    def table(self, step: int, tag: str, table: Any) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_calls_arrive_in_order_and_a_failure_costs_only_itself() -> None:
    listener = Listener(broken={2})
    tracker = MirroredTracker(lambda: listener)
    for step in (1, 2, 3):
        tracker.scalars(step, {})
    tracker.close()
    tracker.close()
    assert (listener.steps, listener.closed) == ([1, 3], True)
    assert tracker.take_trouble() == "No space left on device"
    assert tracker.take_trouble() is None


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_WAITING", 3)
    hold = threading.Event()
    listener, began = Listener(hold=hold), time.monotonic()
    tracker = MirroredTracker(lambda: listener, closing=0.2)
    for step in range(10):
        tracker.scalars(step, {})
    assert tracker.take_trouble() == "3 calls are waiting"
    tracker.close()
    assert tracker.take_trouble() is not None
    assert time.monotonic() - began < 10
    hold.set()


def test_a_full_queue_does_not_swallow_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_WAITING", 3)
    hold = threading.Event()
    listener = Listener(hold=hold)
    tracker = MirroredTracker(lambda: listener)
    for step in range(10):
        tracker.scalars(step, {})
    tracker.end()
    hold.set()
    tracker.close()
    assert listener.closed
    assert tracker.take_trouble() == "3 calls are waiting"


def test_trackers_that_hang_share_the_time_of_the_end() -> None:
    hold = threading.Event()
    trackers = [MirroredTracker(lambda: Listener(hold=hold), closing=1.0) for _ in range(5)]
    for tracker in trackers:
        tracker.scalars(1, {})
    began = time.monotonic()
    for tracker in trackers:
        tracker.end()
    for tracker in trackers:
        tracker.close()
    assert 1.0 <= time.monotonic() - began < 4.0
    assert [tracker.take_trouble() for tracker in trackers] == ["not all was written in 1 s"] * 5
    hold.set()


def test_a_tracker_that_exits_when_it_is_opened_does_not_end_the_run() -> None:
    def leave() -> Listener:
        raise SystemExit("please log in")

    tracker = MirroredTracker(leave)
    tracker.scalars(1, {})
    tracker.close()
    assert tracker.take_trouble() == "SystemExit: please log in"
