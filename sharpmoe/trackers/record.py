"""The interface of a tracker, and the records that it receives of a run. Nothing here imports a tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class TrackedTable(NamedTuple):
    """A table, for trackers that show tables and for those that show text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    text: str  # the same, or more, laid out in columns


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is opened with."""

    folder: Path  # of the run
    name: str
    project: str  # of the tracker: runs that are compared
    first_step: int  # that this process takes; 1: the run begins
    settings: Mapping[str, Any]  # dotted key -> JSON value: the resolved configuration, versions, world
    known_tags: frozenset[str] = frozenset()  # of figures that the run has from processes before
    continued: str | None = None  # the tracker's id of the run that is resumed; None: begin one
    remember: Callable[[str], object] = lambda run_id: None  # to be called once with the id of this run


class Tracker(Protocol):
    """A writer of one run. Every call may raise; `RunLog` turns that into one note."""

    def scalars(self, step: int, figures: Mapping[str, float]) -> object:
        """Write finite figures of a step."""
        ...

    def image(self, step: int, tag: str, pixels: np.ndarray) -> object:
        """Write a picture (H, W, 3) uint8."""
        ...

    def text(self, step: int, tag: str, text: str) -> object:
        """Write a note, laid out as it is."""
        ...

    def table(self, step: int, tag: str, table: TrackedTable) -> object:
        """Write a table."""
        ...

    def close(self) -> object:
        """Write all that is left, and end what was started."""
        ...
