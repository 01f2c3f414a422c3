"""The log of a run: log.jsonl, trackers from step 1, one progress line. Written on rank 0 only.

`sharpmoe.log_file` has the format of log.jsonl.
"""

from __future__ import annotations

import math
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_pipeline.safety import redact
from sharpmoe.console import clock, coloured_note
from sharpmoe.evaluation.validation import Validation
from sharpmoe.log_file import LOG_FILE, LogWriter, logged_steps, read_log
from sharpmoe.trackers.mirror import MirroredTracker, one_line
from sharpmoe.trackers.record import TrackedRun, TrackedTable, Tracker
from sharpmoe.trackers.registry import open_mirrors
from sharpmoe.trackers.tensorboard_events import TensorBoardTracker
from sharpmoe.train.metrics import StepStats, due


class RunLog:
    """Writer of one run folder: log.jsonl, the progress line, and the trackers of `log.trackers`.

    What was written for steps from `first_step` on, by a process that died after the checkpoint, is hidden in
    TensorBoard; to the trackers that cannot hide anything it is not sent a second time. A folder that cannot be
    written, or a tracker that fails, costs figures, not the run: a note is printed once.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        first_step: int = 1,
        every: int = 10,
        stream: TextIO | None = None,
        settings: Mapping[str, Any] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        project: str = "sharpmoe",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.first_step, self.every = total_steps, first_step, every
        self.run = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.progress = _ProgressLine(total_steps, first_step, sys.stdout if stream is None else stream)
        self.images, self.seconds = 0, 0.0  # of the steps of this process
        self.not_taken = 0  # of these steps
        self._complained: set[str] = set()
        self._logged = self._logged_before()
        self.lines = LogWriter(self.folder, self.run)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.event("start", first_step - 1, time=now, settings=dict(settings or {}))
        self.validations: dict[int, float] = {}  # step -> held-out flow loss, also of the processes before
        self._tensorboard: TensorBoardTracker | None = None
        self._mirrors: dict[str, MirroredTracker] = {}
        self._continued: frozenset[str] = frozenset()  # mirrors that hold what the processes before have sent
        self._open_trackers(trackers, project, settings or {})

    def due(self, step: int) -> bool:
        """Whether the figures of this step are written: the first, the last and every `every`-th."""
        return step in (self.first_step, self.total_steps) or due(step, self.every)

    def step(self, stats: StepStats, more: Mapping[str, float] | None = None) -> None:
        """Write one step, with `more` figures such as `routing_scalars`, where it is due; move the progress line."""
        self.images, self.seconds = self.images + stats.images, self.seconds + stats.seconds
        if self.due(stats.step):
            self.scalars(stats.step, {**stats.scalars(), **(more or {})})
        self.progress.update(stats, written=self.due(stats.step))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Write named figures of a step to the trackers and as one line of log.jsonl; not those that are no numbers."""
        finite = {tag: value for tag, value in figures.items() if math.isfinite(value)}
        self._attempt(lambda: self.lines.figures(step, finite))
        new = {tag: value for tag, value in finite.items() if step not in self._logged.get(tag, ())}
        self._track(lambda tracker: tracker.scalars(step, finite), lambda tracker: new and tracker.scalars(step, new))

    def validation(self, step: int, result: Validation, live: Validation | None = None) -> None:
        """Write and print the held-out flow loss after a step; `live`: that of the weights that are not averaged."""
        before = min(self.validations.values(), default=math.inf)
        self.validations[step] = result.mean
        self.scalars(step, result.scalars())
        self.event("validation", step, per_image=list(result.per_image))
        note = "best so far" if result.mean < before else f"best {before:.4f}"
        error = f" ± {result.error:.4f}" if math.isfinite(result.error) else ""  # one image has none
        line = f"validation after step {step}: flow loss {result.mean:.4f}{error} ({note})"
        if live is not None:
            self.scalars(step, live.scalars("validation_live"))
            line += f"; of the live weights {live.mean:.4f}"
        self.say(line)

    def event(self, name: str, step: int, **about: Any) -> None:
        """Write what happened after `step` steps as one line of log.jsonl; values of `about` are JSON values."""
        self._attempt(lambda: self.lines.event(step, name, about))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Write a picture (H, W, 3) uint8 to the trackers."""
        self._show(step, lambda tracker: tracker.image(step, tag, pixels))

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a note to the trackers, laid out as it is."""
        self._show(step, lambda tracker: tracker.text(step, tag, text))

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        """Write a table to the trackers."""
        self._show(step, lambda tracker: tracker.table(step, tag, table))

    def warn(self, step: int, text: str) -> None:
        """Print what the user should act on, and keep it: as an event of log.jsonl, and as text in the trackers."""
        self.say(text)
        self.event("warning", step, text=text)
        self.text(step, "warnings", text)

    def say(self, text: str) -> None:
        """Print text above the progress line."""
        self.progress.say(text)

    def conclude(self, text: str) -> None:
        """End the progress line, which stays, and print text below it."""
        self.progress.close()
        self.say(text)

    def passed(self) -> float:
        """Return the seconds since this log was opened."""
        return time.monotonic() - self.progress.started

    def close(self) -> None:
        """Flush and close; the progress line ends with a line break. A second time it does nothing."""
        if self.lines.closed:
            return
        self.progress.close()
        for mirror in self._mirrors.values():
            mirror.end()
        for name, tracker in self._trackers():
            self._attempt(tracker.close, name)
        self._tell_troubles()
        self._attempt(self.lines.close)

    def _open_trackers(self, names: Sequence[str], project: str, settings: Mapping[str, Any]) -> None:
        curves: dict[str, dict[int, float]] = {}
        self._attempt(lambda: curves.update(read_log(self.folder / LOG_FILE)))
        self.validations = curves.get("validation/flow", {})
        run = TrackedRun(
            folder=self.folder,
            name=self.folder.absolute().name,
            project=project,
            first_step=self.first_step,
            settings={key: redact(value) if isinstance(value, str) else value for key, value in settings.items()},
            known_tags=frozenset(curves),
        )
        self._mirrors, self._continued = open_mirrors(names, run)
        if "tensorboard" in names:
            self._attempt(lambda: self._open_tensorboard(run))

    def _open_tensorboard(self, run: TrackedRun) -> None:
        self._tensorboard = TensorBoardTracker(run)

    def _logged_before(self) -> dict[str, set[int]]:
        """Return the steps of every figure that the processes before have logged, also of those that are done again."""
        found: dict[str, set[int]] = {}
        if self.first_step > 1 and (self.folder / LOG_FILE).exists():
            self._attempt(lambda: found.update(logged_steps(self.folder / LOG_FILE)))
        return found

    def _trackers(self) -> list[tuple[str, Tracker]]:
        tensorboard = [("", self._tensorboard)] if self._tensorboard is not None else []
        return [*tensorboard, *self._mirrors.items()]

    def _track(self, write: Callable[[Tracker], object], write_new: Callable[[Tracker], object] | None = None) -> None:
        """Call all trackers; `write_new` is for those that hold what the processes before have sent."""
        for name, tracker in self._trackers():
            chosen = write_new if write_new is not None and name in self._continued else write
            self._attempt(partial(chosen, tracker), name)
        self._tell_troubles()

    def _show(self, step: int, write: Callable[[Tracker], object]) -> None:
        """Call all trackers, but not those that got the same from a process that came further than this step."""
        further = any(step < max(steps) for steps in self._logged.values())
        self._track(write, (lambda tracker: None) if further else None)

    def _tell_troubles(self) -> None:
        for name, mirror in self._mirrors.items():
            trouble = mirror.take_trouble()
            if trouble is not None:
                self._complain(name, trouble)

    def _attempt(self, write: Callable[[], object], tracker: str = "") -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - what only reports must not end a run
            self._complain(tracker, one_line(error))

    def _complain(self, tracker: str, reason: str) -> None:
        """Print one note for each tracker, and one for the run folder (tracker: empty)."""
        if tracker not in self._complained:
            self._complained.add(tracker)
            where = f"log.trackers: {tracker}" if tracker else str(self.folder)
            self.say(f"note: {where}: figures cannot be written ({reason}); training goes on")


class _ProgressLine:
    """One line that moves on a terminal; one line per written step elsewhere (a file, a Slurm log).

    A stream that cannot be written, such as a file on a full disk, costs its lines, not the run; a pipe that nobody
    reads is an error, as in every command.
    """

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        self.total_steps, self.first_step, self.stream = total_steps, first_step, stream
        self.live = stream.isatty()
        self.started = time.monotonic()
        self.after_first: float | None = None  # when the first step had ended
        self.line = ""

    def update(self, stats: StepStats, written: bool) -> None:
        """Show a step: always on a terminal, elsewhere where its figures were `written`."""
        if self.after_first is None:
            self.after_first = time.monotonic()
        if self.live:  # a line that wraps could not be written over
            self.line = _fitting(self.columns(stats), shutil.get_terminal_size().columns - 1)
            self._write("\r\x1b[K" + self.line)
        elif written:
            self.line = "  ".join(self.columns(stats))
            self._write(self.line + "\n")

    def columns(self, stats: StepStats) -> list[str]:
        """Return counter, time left, speed, losses, gradient norm, learning rates, utilisation, data wait, memory."""
        left = self._left(stats.step)
        speed = stats.images / max(stats.seconds, 1e-9)
        wait = stats.wait_seconds / max(stats.seconds, 1e-9)
        scaled = "".join(f" ({name} {stats.lr * factor:.2e})" for name, factor in stats.lr_scale.items())
        return [
            f"step {stats.step:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"{left:>5} left",
            f"{speed:5.1f} images/s",
            *(f"{name} {_figure(value)}" for name, value in stats.losses.items() if value),
            f"grad {_figure(stats.grad_norm)}",
            f"lr {stats.lr:.2e}{scaled}",
            *([] if stats.mfu is None else [f"mfu {stats.mfu:5.1%}"]),
            f"data {wait:3.0%}",
            f"{stats.memory_mib / 1024:.2f} GiB",
        ]

    def _left(self, step: int) -> str:
        """Return the time left by the steps after the first, which warms up; `?` after that one."""
        done, more = step - self.first_step, self.total_steps - step
        if not more:
            return clock(0)
        if not done or self.after_first is None:
            return "?"
        return clock((time.monotonic() - self.after_first) / done * more)

    def say(self, text: str) -> None:
        """Print text on lines of its own."""
        shown = coloured_note(text, self.stream)
        self._write(("\r\x1b[K" if self.live else "") + shown + "\n" + (self.line if self.live else ""))

    def close(self) -> None:
        """End the moving line."""
        self._write("\n" if self.live and self.line else "")
        self.line = ""

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass


def _fitting(columns: Iterable[str], width: int) -> str:
    """Join the columns, without those that do not fit any more; the first one is cut where it alone is too wide."""
    line = ""
    for column in columns:
        joined = f"{line}  {column}" if line else column[:width]
        line = joined if len(joined) <= width else line
    return line


def _figure(value: float) -> str:
    """Return a number with four significant digits, of one width where it is between 0.001 and 10,000."""
    return f"{value:#.4g}".rjust(7)
