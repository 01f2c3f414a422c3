"""MLflow: the store of MLFLOW_TRACKING_URI, by default files beside the runs; the package reads its own variables."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# A store of files needs no database; MLflow 3.17 takes one only where this is said.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
# A server that does not answer is given up after less than MLflow's quarter of an hour: these are figures, not the run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
# MLflow tells its makers what is used, from threads and with the hardware, unless this is said before it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from sharpmoe.trackers.record import TrackedRun, TrackedTable

_LONGEST = 6000  # characters of a parameter's value that MLflow keeps
_AT_ONCE = 100  # parameters of a request


class MlflowTracker:
    """A run of MLflow, continued by its id."""

    def __init__(self, run: TrackedRun) -> None:
        # The client and not the functions of `mlflow`, which keep an active run and mark it with the user and the file.
        self._client = MlflowClient(tracking_uri=_store(run.folder))
        if run.continued is None:
            tags = {"mlflow.runName": run.name}
            self._id = self._client.create_run(_experiment(self._client, run.project), tags=tags).info.run_id
            params = [Param(_key(key), str(value)[:_LONGEST]) for key, value in run.settings.items()]
            for start in range(0, len(params), _AT_ONCE):
                self._client.log_batch(self._id, params=params[start : start + _AT_ONCE])
        else:
            self._id = run.continued
            self._client.update_run(self._id, status="RUNNING")  # its parameters are those that it began with
        run.remember(self._id)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(_key(tag), value, now, step) for tag, value in figures.items()])

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, artifact_file=f"{tag}/step{step:08}.png")

    def text(self, step: int, tag: str, text: str) -> None:
        self._client.log_text(self._id, text + "\n", f"{tag}/step{step:08}.txt")

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        """Write the table as JSON of MLflow's own form, which its page shows, and as text."""
        data: dict[str, Any] = {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
        self._client.log_dict(self._id, data, f"{tag}/step{step:08}.json")
        self.text(step, tag, table.text)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _store(folder: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or (folder.parent / "mlruns").absolute().as_uri()


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id


def _key(tag: str) -> str:
    """Return a name that MLflow takes: letters, digits, and _ - . space : /."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in tag)
