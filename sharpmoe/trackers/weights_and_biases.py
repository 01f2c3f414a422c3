"""Weights & Biases. WANDB_MODE, WANDB_DIR, WANDB_ENTITY and the key are read by the package itself."""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping

import numpy as np
import wandb

from sharpmoe.trackers.record import TrackedRun, TrackedTable


class WandbTracker:
    """A run of W&B, continued by its id.

    Sent are figures, pictures and the given settings; not the host, the user, the command, the code, the packages, the
    console or the use of the machine.
    """

    def __init__(self, run: TrackedRun) -> None:
        mode = wandb.setup().settings.mode
        if mode in ("online", "shared") and not wandb.api.api_key:
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        run_id = run.continued or secrets.token_hex(4)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.settings),
            settings=_quiet(),
        )
        run.remember(run_id)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._run.log({tag: wandb.Image(pixels)}, step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        data = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({tag: data}, step=step)

    def close(self) -> None:
        """End the run, and the process that serves it."""
        self._run.finish()
        wandb.teardown()


def _quiet() -> wandb.Settings:
    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        host="",
        program="",
    )
