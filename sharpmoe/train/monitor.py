"""What a run is looked at with: held-out flow loss, allocation before and after, sample grids, routing sheets.

Every rank takes part in every measurement, and rank 0 writes. What is looked at is a plain model, normally one with the
averaged weights, that `build` makes (communicating, on all ranks) only where something is due.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.encode.codecs import Codec
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import RunConfig
from sharpmoe.evaluation.allocation import (
    Allocation,
    allocation_scalars,
    allocation_table,
    load_allocation,
    measure_allocation,
    save_allocation,
)
from sharpmoe.evaluation.held_out import Share, spread
from sharpmoe.evaluation.validation import validate, validation_scalars
from sharpmoe.model.dit import DiT
from sharpmoe.report.figures import Pixels, allocation_curves, sample_grid, save_png
from sharpmoe.report.routing_sheet import draw_routing_sheet, observe_routing
from sharpmoe.report.samples import Prompts, draw_images, encode_prompts
from sharpmoe.train.metrics import due
from sharpmoe.train.runlog import RunLog

SHEET_IMAGES = 8


class Looks(NamedTuple):
    """The means of looking at one run; made once, on every rank."""

    run: RunConfig
    folder: Path  # of the run
    held_out: ShardSet
    codec: Codec
    request: sampling.Request | None  # the fixed captions, encoded; None where none are to be drawn
    share: Share
    log: RunLog | None  # rank 0 only


def make_looks(
    run: RunConfig, held_out: ShardSet, folder: Path, device: torch.device, share: Share, log: RunLog | None
) -> Looks:
    """Open the codec, encode the fixed captions to `device`, and read once what will be measured on.

    So damage of held-out samples is an error before the first step. No communication. Raises DataError.
    """
    for index in _measured(run, held_out.num_samples):
        held_out.batch([index])
    wanted = run.log.sample_every > 0 and run.sample.captions and run.model.conditioning == "text"
    request = encode_prompts(run.model, held_out, Prompts(run.sample.captions), device) if wanted else None
    return Looks(run, folder, held_out, held_out.codec_object(), request, share, log)


def _measured(run: RunConfig, num_samples: int) -> list[int]:
    """Held-out samples that the run's measurements read."""
    counts = {run.log.validation_images if run.log.validate_every else 0}
    counts.add(run.log.allocation_images if run.log.allocation else 0)
    return sorted({index for count in counts for index in spread(num_samples, count)})


def look_before(looks: Looks, build: Callable[[], DiT]) -> None:
    """Measure and draw the model that a run starts from (not one that it resumes): step 0, allocation/before.json."""
    log = looks.run.log
    measured = log.allocation and looks.run.model.family.has_experts
    if not (measured or log.sample_every):
        return
    model = build()
    if measured:
        _allocation_before(looks, model)
    if log.sample_every:
        _draw(looks, model, 0)


def look(looks: Looks, build: Callable[[], DiT], step: int) -> None:
    """Validate and draw where it is due after optimizer step `step`; after the last one always, with the allocation."""
    log, last = looks.run.log, step == looks.run.train.steps
    validated = log.validate_every > 0 and (last or due(step, log.validate_every))
    drawn = log.sample_every > 0 and (last or step % log.sample_every == 0)
    measured = last and log.allocation and looks.run.model.family.has_experts
    if not (validated or drawn or measured):
        return
    model = build()
    if validated:
        result = validate(model, looks.held_out, images=log.validation_images, share=looks.share)
        if looks.log is not None:
            looks.log.scalars(step, validation_scalars(result))
    if drawn:
        _draw(looks, model, step)
    if measured:
        _allocation_after(looks, model)


def _allocation_before(looks: Looks, model: DiT) -> None:
    result = _measure(looks, model)
    if looks.log is not None:
        save_allocation(result, looks.folder / "allocation" / "before.json")
        looks.log.scalars(0, allocation_scalars(result))
        looks.log.say(allocation_table({"before": result}))


def _allocation_after(looks: Looks, model: DiT) -> None:
    """Print the allocation of the finished run beside that of its start, where that was measured."""
    result = _measure(looks, model)
    if looks.log is None:
        return
    folder = looks.folder / "allocation"
    save_allocation(result, folder / "after.json")
    before = {"before": load_allocation(folder / "before.json")} if (folder / "before.json").is_file() else {}
    results = {**before, "after": result}
    pixels = allocation_curves(results)
    save_png(pixels, folder / "allocation.png")
    (folder / "table.txt").write_text(allocation_table(results) + "\n", encoding="utf-8")
    step = looks.run.train.steps
    looks.log.scalars(step, allocation_scalars(result))
    looks.log.image(step, "allocation", pixels)
    looks.log.text(step, "allocation", allocation_table(results))
    looks.log.say(allocation_table(results))


def _measure(looks: Looks, model: DiT) -> Allocation:
    return measure_allocation(model, looks.held_out, images=looks.run.log.allocation_images, share=looks.share)


def _draw(looks: Looks, model: DiT, step: int) -> None:
    """Sample grid of the fixed captions and routing sheet of held-out images, to files and TensorBoard."""
    pictures: dict[str, Pixels] = {}
    if looks.request is not None:
        images = draw_images(model, looks.request, looks.run.sample, looks.codec.decode)
        if looks.log is not None:
            pictures["samples"] = sample_grid(images, looks.run.sample.captions)
    if model.moe_layers():
        sheet = observe_routing(model, looks.held_out, looks.codec, SHEET_IMAGES, share=looks.share)
        if looks.log is not None:
            pictures["routing"] = draw_routing_sheet(sheet, f"{looks.run.name}, step {step}")
    if looks.log is not None:
        for kind, pixels in pictures.items():
            save_png(pixels, looks.folder / kind / f"step{step:08}.png")
            looks.log.image(step, kind, pixels)
