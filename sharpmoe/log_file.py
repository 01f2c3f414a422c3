"""log.jsonl of a run folder: its format, and the only functions that write and read it.

The file is only ever appended to, one JSON object per line. `{"run": id, "step": n, "<tag>": value, ...}` holds figures
of step n. `{"event": name, "run": id, "step": n, ...}` is an event after step n: "start" (with all settings) where a
process begins to write, "resume", "fault". The id is one per process, so that the lines of one process can be
selected. Where steps were done twice, because a process died after its last checkpoint and another one continued from
there, `read_log` returns the figures that the run continued from, as TensorBoard shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

LOG_FILE = "log.jsonl"  # name in the run folder


def open_log(folder: Path) -> TextIO:
    """Open the log of a run folder for appending; first end a line that a killed process left incomplete."""
    path = folder / LOG_FILE
    incomplete = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    stream = path.open("a", encoding="utf-8")
    if incomplete:
        stream.write("\n")
    return stream


def write_figures(stream: TextIO, run: str, step: int, figures: Mapping[str, float]) -> None:
    """Append one line of figures, which must be finite, and flush it."""
    _write_line(stream, {"run": run, "step": step, **figures})


def write_event(stream: TextIO, run: str, step: int, event: str, details: Mapping[str, Any]) -> None:
    """Append one event with its details, which must be JSON values, and flush it."""
    _write_line(stream, {"event": event, "run": run, "step": step, **details})


def _write_line(stream: TextIO, record: Mapping[str, Any]) -> None:
    stream.write(json.dumps(record) + "\n")
    stream.flush()


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """Read the figures as {tag: {step: value}}; of steps that were done twice, those that the run continued from."""
    curves: dict[str, dict[int, float]] = {}
    for record in read_log_lines(path):
        step, event, _ = record.pop("step"), record.pop("event", ""), record.pop("run", "")
        if event == "start":
            curves = {tag: {at: value for at, value in points.items() if at <= step} for tag, points in curves.items()}
        elif not event:
            for tag, value in record.items():
                curves.setdefault(tag, {})[step] = value
    return {tag: dict(sorted(points.items())) for tag, points in curves.items() if points}


def read_log_lines(path: Path) -> list[dict[str, Any]]:
    """Read every complete line in the order of writing; skip lines that a killed process left incomplete."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
