"""The log of a run: TensorBoard from step 1, log.jsonl, one progress line. Written on rank 0 only.

`sharpmoe.log_file` has the format of log.jsonl.
"""

from __future__ import annotations

import math
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from sharpmoe.log_file import LogWriter
from sharpmoe.train.metrics import StepStats, due


class RunLog:
    """Writer of one run folder: TensorBoard events, log.jsonl and the progress line.

    What was written for steps from `first_step` on, by a process that died after the checkpoint, is hidden
    (`purge_step`). A folder that cannot be written costs figures, not the run: a note is printed once.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        first_step: int = 1,
        every: int = 10,
        stream: TextIO | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.total_steps, self.first_step, self.every = total_steps, first_step, every
        self.run = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)
        self.lines = LogWriter(self.folder, self.run)
        self.progress = _ProgressLine(total_steps, first_step, sys.stdout if stream is None else stream)
        self._complained = False
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.event("start", first_step - 1, time=now, settings=dict(settings or {}))

    def due(self, step: int) -> bool:
        """Whether the figures of this step are written: the first, the last and every `every`-th."""
        return step in (self.first_step, self.total_steps) or due(step, self.every)

    def step(self, stats: StepStats, more: Mapping[str, float] | None = None) -> None:
        """Write one step, with `more` figures such as `routing_scalars`, where it is due; move the progress line."""
        if self.due(stats.step):
            self.scalars(stats.step, {**stats.scalars(), **(more or {})})
        self.progress.update(stats, written=self.due(stats.step))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Write named figures of a step to TensorBoard and as one line of log.jsonl; not those that are no numbers."""
        finite = {tag: value for tag, value in figures.items() if math.isfinite(value)}

        def write(writer: SummaryWriter) -> None:
            for tag, value in finite.items():
                writer.add_scalar(tag, value, step)

        self._events(write)
        self._attempt(lambda: self.lines.figures(step, finite))

    def event(self, name: str, step: int, **about: Any) -> None:
        """Write what happened after `step` steps as one line of log.jsonl; values of `about` are JSON values."""
        self._attempt(lambda: self.lines.event(step, name, about))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Write a picture (H, W, 3) uint8 to TensorBoard."""
        self._events(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def text(self, step: int, tag: str, text: str) -> None:
        """Write a table or note to TensorBoard, laid out as it is."""
        laid_out = "\n".join("    " + line for line in text.splitlines())
        self._events(lambda writer: writer.add_text(tag, laid_out, step))

    def say(self, text: str) -> None:
        """Print text above the progress line."""
        self.progress.say(text)

    def close(self) -> None:
        """Flush and close; the progress line ends with a line break. A second time it does nothing."""
        if self.lines.closed:
            return
        self.progress.close()
        self._attempt(self.writer.close)
        self._attempt(self.lines.close)

    def _events(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard's file and flush it: a run that is killed keeps its curves."""

        def flushed() -> None:
            write(self.writer)
            self.writer.flush()

        self._attempt(flushed)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if not self._complained:
                self.say(f"note: {self.folder}: figures cannot be written ({error.strerror}); training goes on")
            self._complained = True


class _ProgressLine:
    """One line that moves on a terminal; one line per written step elsewhere (a file, a Slurm log)."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        self.total_steps, self.first_step, self.stream = total_steps, first_step, stream
        self.live = stream.isatty()
        self.started = time.monotonic()
        self.line = ""

    def update(self, stats: StepStats, written: bool) -> None:
        """Show a step: always on a terminal, elsewhere where its figures were `written`."""
        self.line = self.render(stats)
        if self.live:
            self.stream.write("\r\x1b[K" + self.line)
        elif written:
            self.stream.write(self.line + "\n")
        self.stream.flush()

    def render(self, stats: StepStats) -> str:
        """Return counter, losses, gradient norm, learning rates, speed, utilisation, data wait, time left."""
        done = stats.step - self.first_step + 1
        left = (time.monotonic() - self.started) / done * (self.total_steps - stats.step)
        losses = "  ".join(f"{name} {value:.4g}" for name, value in stats.losses.items() if value)
        speed = stats.images / max(stats.seconds, 1e-9)
        wait = stats.wait_seconds / max(stats.seconds, 1e-9)
        scaled = "".join(f" ({name} {stats.lr * factor:.2e})" for name, factor in stats.lr_scale.items())
        used = "" if stats.mfu is None else f"  mfu {stats.mfu:.1%}"
        counter = f"{stats.step:>{len(str(self.total_steps))}}/{self.total_steps}"
        return (
            f"step {counter}  {losses}  grad {stats.grad_norm:.3g}  lr {stats.lr:.2e}{scaled}  {speed:.1f} images/s"
            f"{used}  data {wait:.0%}  left {_clock(left)}"
        )

    def say(self, text: str) -> None:
        """Print text on lines of its own."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n" + (self.line if self.live else ""))
        self.stream.flush()

    def close(self) -> None:
        """End the moving line."""
        if self.live and self.line:
            self.stream.write("\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    """Show a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
