"""What commands show on a console: progress where time passes, durations, colours.

On a terminal progress is a bar that vanishes when it is done; elsewhere (a file, a Slurm log) it is a line every half
minute. Rank 0 alone shows it, on stderr. Nothing here communicates or reads from a device.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

_BETWEEN_LINES = 30.0  # seconds
_BEFORE_BAR = 2.0  # seconds: what is over by then needs no bar
_COLOURS = {"bold": "1", "red": "31", "yellow": "33", "dim": "2"}  # SGR codes

_shown = False  # whether a bar is shown: what happens within it is part of it


@contextmanager
def progress_bar(
    what: str, total: int, unit: str = "image", stream: TextIO | None = None, *, quiet: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show how much of `total` is done, and the time left; yield the function that adds to what is done.

    unit: of what is counted; bytes ("B") are shown in kB, MB and so on. quiet: show nothing. Within another bar, and on
    other ranks than 0, nothing is shown either.
    """
    global _shown
    if quiet or _shown or os.environ.get("RANK", "0") != "0":
        yield lambda count: None
        return
    stream = stream or sys.stderr
    bar = _bar(what, total, unit, stream) if stream.isatty() else None
    lines = _Lines(what, total, stream)
    _shown = True
    try:
        yield bar.update if bar is not None else lines.update
    finally:
        _shown = False
        if bar is not None:
            bar.close()


def _bar(what: str, total: int, unit: str, stream: TextIO) -> tqdm:
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        file=stream,
        leave=False,
        delay=_BEFORE_BAR,
        dynamic_ncols=True,
    )


class _Lines:
    """Progress as lines, for what is no terminal."""

    def __init__(self, what: str, total: int, stream: TextIO) -> None:
        self.what, self.total, self.stream = what, total, stream
        self.done = 0
        self.started = self.last = time.monotonic()

    def update(self, count: int) -> None:
        """Add to what is done; print a line where the last one is half a minute old."""
        self.done += count
        now = time.monotonic()
        if now - self.last < _BETWEEN_LINES or not 0 < self.done < self.total:
            return
        self.last = now
        left = (now - self.started) / self.done * (self.total - self.done)
        print(f"{self.what}: {self.done / self.total:.0%} done, {clock(left)} left", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """Return text in a colour (bold, red, yellow, dim) where `stream` shows colours, else as it is.

    That is a terminal, unless TERM is dumb; NO_COLOR (not empty) forbids colours and FORCE_COLOR asks for them.
    """
    forced = os.environ.get("FORCE_COLOR", "") not in ("", "0")
    allowed = forced or (stream.isatty() and os.environ.get("TERM") != "dumb")
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if allowed and not os.environ.get("NO_COLOR") else text


def print_note(text: str) -> None:
    """Print a note on stderr; an empty one is none."""
    if text:
        print(coloured_note(text, sys.stderr), file=sys.stderr, flush=True)


def coloured_note(text: str, stream: TextIO) -> str:
    """Return text with its first word in colour where that is `note:`, `warning:` or `error:`."""
    colours = {"note": "yellow", "warning": "yellow", "error": "red"}
    word, colon, rest = text.partition(":")
    return coloured(word + colon, colours[word], stream) + rest if colon and word in colours else text
