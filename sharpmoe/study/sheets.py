"""Routing sheets of the arms of a study on common scales: where each arm spends its experts, and what changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.read.shards import ShardSet
from sharpmoe.model.weights import load_model
from sharpmoe.report.compute_sheet import draw_compute_sheet
from sharpmoe.report.figures import save_png
from sharpmoe.report.routing_sheet import RoutingSheet, draw_difference_sheet, draw_routing_sheet, observe_routing
from sharpmoe.report.samples import check_shards
from sharpmoe.study.measure import is_trained, weights_of
from sharpmoe.study.plan import Part, Study


def draw_sheets(study: Study, split: str, images: int, say: Callable[[str], object]) -> list[Path]:
    """Draw routing sheets of every arm's first finished seed, and return their files, the most telling first.

    sheets-SPLIT/arms.png: experts per token over all t, relative to an even spread, all arms side by side;
    routing-ARM.png: every denoising step, all arms on one scale; difference-ARM.png: the arm minus the control, all on
    one scale. The images are spread over the split's part.
    """
    sheets = {part.arm.name: _observe(study, part, split, images) for part in _shown(study)}
    if not sheets:
        return []
    folder = study.folder / f"sheets-{split}"
    say(f"drawing {2 * len(sheets)} routing sheets to {folder}")
    files = [save_png(draw_compute_sheet(sheets, study.name, ranges=("all t",)), folder / "arms.png")]
    most = max(float(sheet.experts.max()) for sheet in sheets.values())
    for arm, sheet in sheets.items():
        files.append(save_png(draw_routing_sheet(sheet, arm, most), folder / f"routing-{arm}.png"))
    control = sheets.get(study.control)
    others = {arm: sheet for arm, sheet in sheets.items() if arm != study.control} if control is not None else {}
    if control is None or not others:
        return files
    widest = max(float((sheet.experts - control.experts).abs().max()) for sheet in others.values())
    for arm, sheet in others.items():
        pixels = draw_difference_sheet(control, sheet, f"{arm} minus {study.control}", widest)
        files.append(save_png(pixels, folder / f"difference-{arm}.png"))
    return files


def _shown(study: Study) -> list[Part]:
    """Return the first finished seed of every arm that has MoE layers."""
    found: dict[str, Part] = {}
    for part in study.parts:
        if part.arm.name not in found and part.run.model.family.has_experts and is_trained(part):
            found[part.arm.name] = part
    return [found[arm.name] for arm in study.arms if arm.name in found]


def _observe(study: Study, part: Part, split: str, images: int) -> RoutingSheet:
    data = study.measured_data
    shards = ShardSet.open(data.first_place, getattr(study.evaluate, split), data.remote.options())
    model, header = load_model(weights_of(study, part))
    check_shards(model.config, shards, header)
    return observe_routing(model, shards, shards.codec_object(), images, study.evaluate.seed)
