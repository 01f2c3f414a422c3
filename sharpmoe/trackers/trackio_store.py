"""Trackio: a database on this machine, or a Space. TRACKIO_DIR, TRACKIO_SPACE_ID and so on are read by the package."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import trackio

from sharpmoe.trackers.record import TrackedRun, TrackedTable


class TrackioTracker:
    """A run of Trackio, which is continued by its name: so that is unique."""

    def __init__(self, run: TrackedRun) -> None:
        name = run.continued or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        run.remember(name)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._run.log({tag: trackio.Image(pixels)}, step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        data = trackio.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({tag: data}, step=step)

    def close(self) -> None:
        self._run.finish()
