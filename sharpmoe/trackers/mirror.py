"""A tracker in a thread of its own, so that the network and the disk of a tracker never hold up the training."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from sharpmoe.trackers.record import TrackedTable, Tracker

_WAITING = 10_000  # calls; a tracker that is so far behind loses the next ones
_CLOSING = 60.0  # seconds that the end of a run waits for what is left to be written, by all trackers together


class MirroredTracker:
    """Opens a tracker and calls it from a thread; what fails there is kept for `take_trouble`, and nothing raises."""

    def __init__(self, open_tracker: Callable[[], Tracker], closing: float = _CLOSING) -> None:
        self._calls: queue.SimpleQueue[Callable[[Tracker], object] | None] = queue.SimpleQueue()
        self._closing = closing
        self._deadline: float | None = None  # of the end, once it is asked for
        self._closed = False
        self._trouble: str | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, args=(open_tracker,), daemon=True)
        self._thread.start()

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.scalars(step, figures))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._put(lambda tracker: tracker.image(step, tag, pixels))

    def text(self, step: int, tag: str, text: str) -> None:
        self._put(lambda tracker: tracker.text(step, tag, text))

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        self._put(lambda tracker: tracker.table(step, tag, table))

    def close(self) -> None:
        """Write what is left and close the tracker, in a minute at most after `end`; a second time it does nothing."""
        if self._closed:
            return
        self._closed = True
        self._thread.join(max(0.0, self.end() - time.monotonic()))
        if self._thread.is_alive():
            self._note(f"not all was written in {self._closing:g} s")

    def end(self) -> float:
        """Tell the thread to close the tracker after what is left, and return until when `close` waits for it.

        Does not wait: trackers that are all asked to end before the first is closed share one minute.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + self._closing
            self._calls.put(None)
        return self._deadline

    def take_trouble(self) -> str | None:
        """Return the first thing that went wrong since the last call."""
        with self._lock:
            trouble, self._trouble = self._trouble, None
        return trouble

    def _put(self, call: Callable[[Tracker], object]) -> None:
        if self._calls.qsize() < _WAITING:  # the end is put regardless: a queue that is full must not swallow it
            self._calls.put(call)
        else:
            self._note(f"{_WAITING} calls are waiting")

    def _work(self, open_tracker: Callable[[], Tracker]) -> None:
        try:
            tracker = open_tracker()
        except BaseException as error:  # noqa: BLE001 - what only reports must not end a run; nor may a SystemExit
            self._note(one_line(error))
            while self._calls.get() is not None:
                pass
            return
        while (call := self._calls.get()) is not None:
            self._attempt(lambda tracker=tracker, call=call: call(tracker))  # type: ignore[misc]
        self._attempt(tracker.close)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - what only reports must not end a run
            self._note(one_line(error))

    def _note(self, trouble: str) -> None:
        with self._lock:
            self._trouble = self._trouble or trouble


def one_line(error: BaseException) -> str:
    """Return what an error says, without line breaks."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or " ".join(f"{type(error).__name__}: {error}".split())
