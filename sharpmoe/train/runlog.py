"""The log of a run: TensorBoard from step 1, log.jsonl, one progress line. Written on rank 0 only.

`sharpmoe.log_file` has the format of log.jsonl.
"""

from __future__ import annotations

import math
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sharpmoe.console import clock, coloured_note
from sharpmoe.evaluation.validation import Validation
from sharpmoe.log_file import LOG_FILE, LogWriter, read_log
from sharpmoe.train.metrics import StepStats, due

# Tab "Custom Scalars" of TensorBoard: section -> chart -> pattern of the tags (from their start) that it shows. What
# tells first how a run goes comes first; the other tabs order groups by name.
_CHARTS = {
    "Loss": {
        "total and flow": r"loss/(total|flow)$",
        "all terms": r"loss/",
        "gradient norm before clipping": r"optim/grad_norm$",
    },
    "Validation": {
        "held-out flow loss, averaged and live weights": r"validation(_live)?/flow$",
        "held-out flow loss by t": r"validation/flow_t",
    },
    "Learning rate": {"learning rate": r"optim/lr(/|$)", "weight of the routing loss": r"optim/routing_weight$"},
    "Throughput": {
        "images per second": r"throughput/images_per_second$",
        "share of the peak rate (MFU, HFU)": r"throughput/[mh]fu$",
        "share of a step spent waiting for data": r"throughput/data_wait_share$",
        "peak memory of a rank, MiB": r"memory/peak_mib$",
    },
    "Allocation, before and after": {
        "rank correlation of experts per token with saliency M": r"allocation_saliency/",
        "experts per token": r"allocation_experts/",
        "flow loss": r"allocation_flow/",
    },
    "Experts, by layer": {
        "load of the least and the most loaded expert over the mean": r"routing_load_(min|max)/",
        "experts without a token": r"routing_dead_experts/",
        "entropy of the scores over its maximum": r"routing_entropy/",
    },
    "Saliency routers, by layer and t": {
        "spread of their logits over that of the gate's": r"saliency_spread_",
        "share of choices that the gate alone would not make": r"saliency_flipped_",
        "correlation of experts per token with M": r"saliency_agreement_",
    },
}
_METHOD = ("loss", "optim", "rollout", "train", "model")  # sections of the settings on tab "HParams"
_COMPARED = ("loss/total", "validation/flow", "throughput/images_per_second")  # and its figures


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
        self.writer: SummaryWriter | None = None
        self.lines = LogWriter(self.folder, self.run)
        self.progress = _ProgressLine(total_steps, first_step, sys.stdout if stream is None else stream)
        self.images, self.seconds = 0, 0.0  # of the steps of this process
        self._complained = False
        self._tags: set[str] = set()  # of the figures in this folder
        self._layout: dict[str, dict[str, list[Any]]] = {}  # as it was last written
        self._attempt(self._open_events)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.event("start", first_step - 1, time=now, settings=dict(settings or {}))
        self.validations: dict[int, float] = {}  # step -> held-out flow loss, also of the processes before
        self._attempt(self._read_earlier)
        self._events(lambda writer: _write_settings(writer, settings or {}))

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
        """Write named figures of a step to TensorBoard and as one line of log.jsonl; not those that are no numbers."""
        finite = {tag: value for tag, value in figures.items() if math.isfinite(value)}

        def write(writer: SummaryWriter) -> None:
            for tag, value in finite.items():
                writer.add_scalar(tag, value, step)
            self._write_layout(writer, finite)

        self._events(write)
        self._attempt(lambda: self.lines.figures(step, finite))

    def validation(self, step: int, result: Validation, live: Validation | None = None) -> None:
        """Write and print the held-out flow loss after a step; `live`: that of the weights that are not averaged."""
        before = min(self.validations.values(), default=math.inf)
        self.validations[step] = result.mean
        self.scalars(step, result.scalars())
        note = "best so far" if result.mean < before else f"best {before:.4f}"
        line = f"validation after step {step}: flow loss {result.mean:.4f} ± {result.error:.4f} ({note})"
        if live is not None:
            tags = {tag.replace("validation/", "validation_live/"): value for tag, value in live.scalars().items()}
            self.scalars(step, tags)
            line += f"; of the live weights {live.mean:.4f}"
        self.say(line)

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

    def warn(self, step: int, text: str) -> None:
        """Print what the user should act on, and keep it: as an event of log.jsonl, and as text in TensorBoard."""
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
        if self.writer is not None:
            self._attempt(self.writer.close)
        self._attempt(self.lines.close)

    def _events(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard's file and flush it: a run that is killed keeps its curves."""

        def flushed(writer: SummaryWriter) -> None:
            write(writer)
            writer.flush()

        if self.writer is not None:
            self._attempt(partial(flushed, self.writer))

    def _open_events(self) -> None:
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_step)

    def _read_earlier(self) -> None:
        curves = read_log(self.folder / LOG_FILE)
        self.validations, self._tags = curves.get("validation/flow", {}), set(curves)

    def _write_layout(self, writer: SummaryWriter, tags: Iterable[str]) -> None:
        """Write the layout where a chart has got its first tag: TensorBoard shows the last one of a folder."""
        if self._layout and self._tags.issuperset(tags):
            return
        self._tags |= set(tags)
        layout = _layout(self._tags)
        if layout != self._layout:
            self._layout = layout
            writer.add_custom_scalars(layout)

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - what only reports must not end a run
            if not self._complained:
                self.say(f"note: {self.folder}: figures cannot be written ({_reason(error)}); training goes on")
            self._complained = True


def _layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the charts that have tags, as `SummaryWriter.add_custom_scalars` takes it."""
    known = sorted(tags)
    layout = {}
    for section, charts in _CHARTS.items():
        shown = {title: pattern for title, pattern in charts.items() if any(re.match(pattern, tag) for tag in known)}
        if shown:
            layout[section] = {title: ["Multiline", [pattern]] for title, pattern in shown.items()}
    return layout


def _write_settings(writer: SummaryWriter, settings: Mapping[str, Any]) -> None:
    """Write the settings for tab "HParams", beside the curves; `add_hparams` would make a run of its own of them."""
    chosen = {key: value for key, value in settings.items() if key.partition(".")[0] in _METHOD}
    if chosen:
        values = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in chosen.items()}
        for summary in hparams(values, dict.fromkeys(_COMPARED, 0.0))[:2]:  # not the third: that the run has ended
            writer.file_writer.add_summary(summary)


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or " ".join(f"{type(error).__name__}: {error}".split())


class _ProgressLine:
    """One line that moves on a terminal; one line per written step elsewhere (a file, a Slurm log).

    A stream that cannot be written, such as a file on a full disk, costs its lines, not the run; a pipe that nobody
    reads is an error, as in every command.
    """

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        self.total_steps, self.first_step, self.stream = total_steps, first_step, stream
        self.live = stream.isatty()
        self.started = time.monotonic()
        self.line = ""

    def update(self, stats: StepStats, written: bool) -> None:
        """Show a step: always on a terminal, elsewhere where its figures were `written`."""
        if self.live:  # a line that wraps could not be written over
            self.line = _fitting(self.columns(stats), shutil.get_terminal_size().columns - 1)
            self._write("\r\x1b[K" + self.line)
        elif written:
            self.line = "  ".join(self.columns(stats))
            self._write(self.line + "\n")

    def columns(self, stats: StepStats) -> list[str]:
        """Return counter, time left, speed, losses, gradient norm, learning rates, utilisation, data wait, memory."""
        done = stats.step - self.first_step + 1
        left = clock((time.monotonic() - self.started) / done * (self.total_steps - stats.step))
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
