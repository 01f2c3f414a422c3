"""log.jsonl of a run folder: its format, and the only functions that write and read it.

The file is only ever appended to, one JSON object per line. `{"run": id, "step": n, "<tag>": value, ...}` holds figures
of step n. `{"event": name, "run": id, "step": n, ...}` is an event after step n: "start" (with all settings) where a
process begins to write, "resume", "fault", "warning" (its text), "validation" (the flow loss of every held-out image).
The id is one per process, so that the lines of one process can be selected. Where steps were done twice, because a
process died after its last checkpoint and another one continued from there, `read_log` returns the figures that the run
continued from, as TensorBoard shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"  # name in the run folder


class LogWriter:
    """Appends to the log of a run folder, in the name of one process. Whatever cannot be written raises OSError."""

    def __init__(self, folder: Path, run: str) -> None:
        """Open the log; first end a line that a killed process left incomplete. `run`: the id of this process."""
        path = folder / LOG_FILE
        incomplete = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._run, self._stream = run, path.open("a", encoding="utf-8")
        if incomplete:
            self._stream.write("\n")

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line of figures, which must be finite, and flush it."""
        self._append({"run": self._run, "step": step, **figures})

    def event(self, step: int, event: str, details: Mapping[str, Any]) -> None:
        """Append one event with its details, which must be JSON values, and flush it."""
        self._append({"event": event, "run": self._run, "step": step, **details})

    @property
    def closed(self) -> bool:
        """Whether it takes no more lines."""
        return self._stream.closed

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()


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


def logged_steps(path: Path) -> dict[str, set[int]]:
    """Return the steps of every figure that were written since the run last began, also those that were done twice."""
    steps: dict[str, set[int]] = {}
    for record in read_log_lines(path):
        if record.get("event") == "start" and record["step"] == 0:
            steps = {}
        elif "event" not in record:
            for tag in record.keys() - {"run", "step"}:
                steps.setdefault(tag, set()).add(record["step"])
    return steps


def read_log_lines(path: Path) -> list[dict[str, Any]]:
    """Read every complete line in the order of writing; skip lines that a killed process left incomplete."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
