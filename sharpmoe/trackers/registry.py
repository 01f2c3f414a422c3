"""Which trackers there are (`log.trackers`), what each needs, and how one is opened."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sharpmoe import durable
from sharpmoe.errors import ConfigError
from sharpmoe.trackers.mirror import MirroredTracker
from sharpmoe.trackers.record import TrackedRun, Tracker

TRACKER_IDS_FILE = "trackers.json"  # in the run folder: tracker -> its id of the run
_IDS = threading.Lock()  # of that file: each tracker has a thread


class _Mirror(NamedTuple):
    """A tracker of an optional package."""

    package: str  # that is imported
    distribution: str  # that is installed
    module: str  # of sharpmoe.trackers, which imports the package
    tracker: str  # class in that module

    def open(self, run: TrackedRun) -> Tracker:
        """Import the package and begin, or continue, a run."""
        tracker: Tracker = getattr(import_module(f"sharpmoe.trackers.{self.module}"), self.tracker)(run)
        return tracker


MIRRORS: dict[str, _Mirror] = {
    "wandb": _Mirror("wandb", "wandb", "weights_and_biases", "WandbTracker"),
    "trackio": _Mirror("trackio", "trackio", "trackio_store", "TrackioTracker"),
    "mlflow": _Mirror("mlflow", "mlflow-skinny", "mlflow_store", "MlflowTracker"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError where the package of a tracker is not installed. No communication."""
    for kind in (MIRRORS[name] for name in names if name in MIRRORS):
        if find_spec(kind.package) is None:
            raise ConfigError(
                f"log.trackers: {kind.package} is not installed; install the extra: pip install 'sharpmoe[trackers]' "
                f"(or pip install {kind.distribution}), or remove it from log.trackers"
            )


def open_mirrors(names: Sequence[str], run: TrackedRun) -> tuple[dict[str, MirroredTracker], frozenset[str]]:
    """Open every tracker but TensorBoard in a thread; returns them, and the names of those that continue a run.

    A run that resumes (`first_step` above 1) continues the one whose id is in the run folder; one that begins again
    gets another id.
    """
    known = read_ids(run.folder) if run.first_step > 1 else {}
    mirrors = {}
    for name in (name for name in names if name in MIRRORS):
        told = replace(run, continued=known.get(name), remember=partial(_remember, run.folder, name))
        mirrors[name] = MirroredTracker(partial(MIRRORS[name].open, told))
    return mirrors, frozenset(known.keys() & mirrors.keys())


def read_ids(folder: Path) -> dict[str, str]:
    """Return the ids that the trackers gave a run; none where the file is missing or damaged."""
    try:
        found = json.loads((folder / TRACKER_IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(each) for name, each in found.items()} if isinstance(found, dict) else {}


def _remember(folder: Path, name: str, run_id: str) -> None:
    with _IDS:
        ids = json.dumps(read_ids(folder) | {name: run_id}, indent=2, sort_keys=True)
        durable.write_atomically(folder / TRACKER_IDS_FILE, ids)
