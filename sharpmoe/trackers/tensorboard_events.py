"""TensorBoard: event files in the run folder, with custom scalars and hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sharpmoe.trackers.record import TrackedRun, TrackedTable

TENSORBOARD_FOLDER = "tensorboard"  # in the run folder
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
    "Samples": {
        "Frechet distance to held-out images": r"metrics/f(i)?d$",
        "other distances": r"metrics/(kid|cmmd)$",
        "accuracy, precision, recall": r"metrics/(accuracy|precision|recall)$",
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


class TensorBoardTracker:
    """Writes and flushes each time: a run that is killed keeps its curves.

    What was written for steps from the first one on, by a process that died after the checkpoint, is hidden
    (`purge_step`).
    """

    def __init__(self, run: TrackedRun) -> None:
        self._tags = set(run.known_tags)
        self._layout: dict[str, dict[str, list[Any]]] = {}  # as it was last written
        self._writer = SummaryWriter(str(run.folder / TENSORBOARD_FOLDER), purge_step=run.first_step)
        _write_settings(self._writer, run.settings)
        self._writer.flush()

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures, and the layout of their charts where it changes."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)
        self._write_layout(figures)
        self._writer.flush()

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._writer.add_image(tag, pixels, step, dataformats="HWC")
        self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Write text as a block of code, which TensorBoard's Markdown leaves as it is."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)
        self._writer.flush()

    def table(self, step: int, tag: str, table: TrackedTable) -> None:
        self.text(step, tag, table.text)

    def close(self) -> None:
        self._writer.close()

    def _write_layout(self, tags: Iterable[str]) -> None:
        """Write the layout where a chart has got its first tag: TensorBoard shows the last one of a folder."""
        if self._layout and self._tags.issuperset(tags):
            return
        self._tags |= set(tags)
        layout = _layout(self._tags)
        if layout != self._layout:
            self._layout = layout
            self._writer.add_custom_scalars(layout)


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
