"""What a run measures and draws: held-out flow loss, allocation before and after, sample grids, routing sheets.

Every rank takes part in every measurement, and rank 0 writes. Measured is a plain model, normally one with the averaged
weights, that `build` makes (communicating, on all ranks) only where something is due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from data_pipeline.encode.codecs import Codec
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import RunConfig
from sharpmoe.errors import SharpMoEError, TrainingError, outside_error
from sharpmoe.evaluation.allocation import Allocation, measure_allocation
from sharpmoe.evaluation.allocation_table import allocation_table, short_allocation_table
from sharpmoe.evaluation.held_out import Share, spread
from sharpmoe.evaluation.validation import Validation, validate
from sharpmoe.model.backbone import Backbone
from sharpmoe.parallel.ranks.signals import StopAskedError
from sharpmoe.report.figures import Pixels, allocation_curves, sample_grid, save_png
from sharpmoe.report.routing_sheet import RoutingSheet, draw_routing_sheet, observe_routing
from sharpmoe.report.runs import EARLY_AVERAGE
from sharpmoe.report.samples import Prompts, draw_images, encode_prompts
from sharpmoe.trackers.record import TrackedTable
from sharpmoe.train.callbacks import CallbackCalls, TrainingLook
from sharpmoe.train.metrics import due
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.sample_judge import SampleJudge, metrics_line

_SHEET_IMAGES = 8

_Result = TypeVar("_Result")
_Agree = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class _Material:
    """What measurements and pictures are made of."""

    held_out: ShardSet
    codec: Codec
    request: sampling.Request | None  # the fixed captions, encoded; None where none are to be drawn
    judge: SampleJudge | None  # None where samples are not judged


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Measures and draws the model of one run; made once, on every rank."""

    run: RunConfig
    folder: Path  # of the run
    material: _Material | None  # None where the run measures nothing
    share: Share
    log: RunLog | None  # rank 0 only
    agree: _Agree = nullcontext  # context in which an error of one rank is raised on all
    callbacks: CallbackCalls

    @classmethod
    def open(
        cls,
        run: RunConfig,
        held_out: ShardSet | None,
        folder: Path,
        device: torch.device,
        share: Share,
        log: RunLog | None,
        agree: _Agree = nullcontext,
        callbacks: CallbackCalls | None = None,
    ) -> Monitor:
        """Open the codec, encode the fixed captions to `device`, and read once what will be measured on.

        So damage of held-out samples is an error before the first step. held_out: None where the run `measures`
        nothing. No communication. Raises DataError.
        """
        material = None if held_out is None else _open_material(run, held_out, device)
        return cls(
            run=run,
            folder=folder,
            material=material,
            share=share,
            log=log,
            agree=agree,
            callbacks=callbacks or CallbackCalls({}),
        )

    @property
    def judges(self) -> str:
        """Which samples are judged and by what; "" where none are."""
        return "" if self.material is None or self.material.judge is None else self.material.judge.title

    def before_training(self, build: Callable[[], Backbone]) -> None:
        """Measure and draw the model that a run starts from (not one that it resumes): allocation/before.json."""
        log = self.run.log
        measured = log.allocation and self.run.model.family.has_experts
        if self.material is None or not (measured or log.sample_every or log.metrics_every):
            return
        model = build()
        if measured:
            self._allocation_before(model, self.material)
        if log.sample_every:
            self._draw(model, self.material, 0)
        self._judge(model, self.material, 0)

    def after_step(
        self, step: int, build: Callable[[], Backbone], build_live: Callable[[], Backbone] | None = None
    ) -> None:
        """Validate and draw where it is due after optimizer step `step`; after the last always, with the allocation.

        While much of the average is still the start, the model of `build_live` is validated too.
        """
        log, last = self.run.log, step == self.run.train.steps
        validated = log.validate_every > 0 and (last or due(step, log.validate_every))
        drawn = log.sample_every > 0 and (last or step % log.sample_every == 0)
        judged = log.metrics_every > 0 and (last or step % log.metrics_every == 0)
        measured = last and log.allocation and self.run.model.family.has_experts
        if self.material is None or not (validated or drawn or judged or measured):
            return
        compared = validated and build_live is not None and self.run.optim.ema_start_share(step) > EARLY_AVERAGE
        live = self._validate(build_live(), self.material) if compared and build_live is not None else None
        model = build()
        result = self._validate(model, self.material) if validated else None
        if result is not None:
            self._report("the validation", lambda log: log.validation(step, result, live))
            self._tell(step, "validation", result.scalars() | ({} if live is None else live.scalars("validation_live")))
        if drawn:
            self._draw(model, self.material, step)
        if judged:
            self._judge(model, self.material, step)
        if measured:
            self._allocation_after(model, self.material)

    def _allocation_before(self, model: Backbone, material: _Material) -> None:
        result = self._measure(model, material)
        if result is None:
            return

        def write(log: RunLog) -> None:
            result.save(self.folder / "allocation" / "before.json")
            log.scalars(0, result.scalars())
            self._tell_allocation(log, {"before": result})
            self._tell(0, "allocation", result.scalars())

        self._report("the allocation before training", write)

    def _allocation_after(self, model: Backbone, material: _Material) -> None:
        """Print the allocation of the finished run beside that of its start, where that was measured."""
        result = self._measure(model, material)
        if result is None:
            return

        def write(log: RunLog) -> None:
            folder, step = self.folder / "allocation", self.run.train.steps
            result.save(folder / "after.json")
            before = {"before": Allocation.load(folder / "before.json")} if (folder / "before.json").is_file() else {}
            results = {**before, "after": result}
            pixels = allocation_curves(results)
            save_png(pixels, folder / "allocation.png")
            log.scalars(step, result.scalars())
            log.image(step, "allocation", pixels)
            log.table(step, "allocation", _allocation_of(results))
            self._tell_allocation(log, results)
            self._tell(step, "allocation", result.scalars(), pixels, folder / "allocation.png")

        self._report("the allocation after training", write)

    def _tell_allocation(self, log: RunLog, results: dict[str, Allocation]) -> None:
        """Write all figures to allocation/table.txt, and those that matter first to summary.txt and the console."""
        folder = self.folder / "allocation"
        short = short_allocation_table(results, folder / "table.txt")
        (folder / "table.txt").write_text(allocation_table(results) + "\n", encoding="utf-8")
        (folder / "summary.txt").write_text(short + "\n", encoding="utf-8")
        log.say(short)

    def _measure(self, model: Backbone, material: _Material) -> Allocation | None:
        images, share = self.run.log.allocation_images, self.share
        return self._attempt(
            "the allocation", lambda: measure_allocation(model, material.held_out, images=images, share=share)
        )

    def _validate(self, model: Backbone, material: _Material) -> Validation | None:
        images, share = self.run.log.validation_images, self.share
        return self._attempt("the validation", lambda: validate(model, material.held_out, images=images, share=share))

    def _draw(self, model: Backbone, material: _Material, step: int) -> None:
        """Sample grid of the fixed captions and routing sheet of held-out images, to files and TensorBoard."""
        pictures: dict[str, Callable[[], Pixels]] = {}
        request, codec, sample = material.request, material.codec, self.run.sample
        if request is not None:
            images = self._attempt("the samples", lambda: draw_images(model, request, sample, codec.decode))
            if images is not None:
                pictures["samples"] = lambda: sample_grid(images, sample.captions)
        if model.moe_layers():
            held_out, share = material.held_out, self.share
            sheet = self._attempt(
                "the routing sheet", lambda: observe_routing(model, held_out, codec, _SHEET_IMAGES, share=share)
            )
            if sheet is not None:
                pictures["routing"] = lambda: draw_routing_sheet(sheet, f"{self.run.name}, step {step}")
                self._report("the routing of held-out images", lambda log: self._keep(step, sheet))
        for kind, draw in pictures.items():
            self._report(f"the picture of {kind}", partial(self._show, step, kind, draw))

    def _judge(self, model: Backbone, material: _Material, step: int) -> None:
        """Draw samples of held-out captions or classes over the ranks; rank 0 compares them with held-out images."""
        judge, share = material.judge, self.share
        if judge is None:
            return
        samples = self._attempt("the judged samples", lambda: judge.draw(model, share))
        if samples is None:
            return

        def write(log: RunLog) -> None:
            found = judge.judge(samples)
            figures = {f"metrics/{name}": figure.value for name, figure in found.items()}
            log.scalars(step, figures)
            log.say(f"samples after step {step}: {metrics_line(found)} ({judge.title})")
            self._tell(step, "metrics", figures)

        self._report("the figures of samples", write)

    def _keep(self, step: int, sheet: RoutingSheet) -> None:
        """Save what a routing sheet shows, so that a report draws those of two steps on one colour scale."""
        sheet.save(self.folder / "routing" / f"step{step:08}.npz")

    def _show(self, step: int, kind: str, draw: Callable[[], Pixels], log: RunLog) -> None:
        pixels = draw()
        path = save_png(pixels, self.folder / kind / f"step{step:08}.png")
        log.image(step, kind, pixels)
        self._tell(step, kind, {}, pixels, path)

    def _tell(
        self,
        step: int,
        kind: Any,
        figures: Mapping[str, float],
        pixels: Pixels | None = None,
        path: Path | None = None,
    ) -> None:
        """Tell the callbacks what was made."""
        if pixels is not None:
            pixels = pixels.view()
            pixels.flags.writeable = False
        figures = MappingProxyType(dict(figures))
        self.callbacks.on_look(TrainingLook(step=step, kind=kind, figures=figures, pixels=pixels, path=path))

    def _attempt(self, what: str, measure: Callable[[], _Result]) -> _Result | None:
        """Measure on all ranks. Where any of them fails, return None on all and note it: training does not need it."""
        try:
            with self.agree():
                try:
                    return measure()
                except (SharpMoEError, StopAskedError):
                    raise
                except Exception as error:
                    raise TrainingError(_reason(error)) from error
        except SharpMoEError as error:
            if self.log is not None:
                self.log.say(f"note: {what} could not be made: {error}; training goes on")
            return None

    def _report(self, what: str, write: Callable[[RunLog], object]) -> None:
        """On rank 0, draw or write what only reports, without communication. What fails is noted and left out."""
        if self.log is None:
            return
        try:
            write(self.log)
        except Exception as error:  # noqa: BLE001 - a report that fails must not end a run
            self.log.say(f"note: {what} could not be written: {_reason(error)}; training goes on")


def _allocation_of(results: Mapping[str, Allocation]) -> TrackedTable:
    """Return every figure of the results, one column each, with the table as text."""
    figures = {name: result.scalars() for name, result in results.items()}
    tags = dict.fromkeys(tag for column in figures.values() for tag in column)
    rows = tuple((tag, *(column.get(tag) for column in figures.values())) for tag in tags)
    return TrackedTable(("figure", *figures), rows, allocation_table(results))


def _reason(error: Exception) -> str:
    """Return what went wrong as one line."""
    return " ".join(str(outside_error(error) or f"{type(error).__name__}: {error}").split())


def measures(run: RunConfig) -> bool:
    """Whether a run measures or draws anything, for which it needs a held-out split."""
    log = run.log
    is_asked = log.validate_every > 0 or log.sample_every > 0 or log.metrics_every > 0
    return is_asked or (log.allocation and run.model.family.has_experts)


def _open_material(run: RunConfig, held_out: ShardSet, device: torch.device) -> _Material:
    for index in _measured(run, held_out.num_samples):
        held_out.batch([index])
    wanted = run.log.sample_every > 0 and run.sample.captions and run.model.conditioning == "text"
    request = encode_prompts(run.model, held_out, Prompts(run.sample.captions), device) if wanted else None
    codec = held_out.codec_object()
    judge = SampleJudge.open(run, held_out, codec, device) if run.log.metrics_every else None
    return _Material(held_out=held_out, codec=codec, request=request, judge=judge)


def _measured(run: RunConfig, num_samples: int) -> list[int]:
    """Held-out samples that the run's measurements read."""
    counts = {run.log.validation_images if run.log.validate_every else 0}
    counts.add(run.log.allocation_images if run.log.allocation else 0)
    return sorted({index for count in counts for index in spread(num_samples, count)})
