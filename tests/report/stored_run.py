"""Run folders with stored figures only: log, allocations, routing and pictures, without a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sharpmoe.evaluation.allocation import (
    ALLOCATION_RANGES,
    ALLOCATION_TIMES,
    IMAGE_PARTS,
    UNKNOWN_MEAN,
    Allocation,
    ImageMean,
)
from sharpmoe.report.figures import sample_grid, save_png
from sharpmoe.report.routing_sheet import RoutingSheet

IMAGES = 12
NASTY = "<script>alert(1)</script>"


def allocation(shift: float = 0.0, flow: float = 0.5, flipped: float = 0.05, spread: float = 0.4) -> Allocation:
    """Return an allocation whose values per image vary; `shift` is added to all correlations."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(IMAGES, generator=g) * 0.02
    noise -= noise.mean()
    values = {
        "saliency": 0.2 + shift + noise * (1 + shift),
        "foreground": torch.full((IMAGES,), torch.nan),
        "experts": torch.ones(IMAGES),
        "flow": flow * (1 + noise * 0.1 * (1 + shift)),
        **{f"flow, {part}": torch.full((IMAGES,), flow) for part in IMAGE_PARTS},
    }

    def mean(row: torch.Tensor) -> ImageMean:
        known = row[~row.isnan()].double()
        if not len(known):
            return UNKNOWN_MEAN
        return ImageMean(known.mean().item(), (known.std() / len(known) ** 0.5).item(), len(known))

    means = {what: dict.fromkeys(ALLOCATION_RANGES, mean(row)) for what, row in values.items()}
    strength = {"spread": spread, "flipped": flipped, "agreement": 0.3}
    return Allocation(
        saliency=means["saliency"],
        foreground=means["foreground"],
        experts=means["experts"],
        flow=means["flow"],
        flow_markov={},
        flow_parts={part: means[f"flow, {part}"] for part in IMAGE_PARTS},
        saliency_by_time=dict.fromkeys(ALLOCATION_TIMES, means["saliency"]["all t"]),
        experts_by_saliency={name: (ImageMean(1.0, 0.1, IMAGES),) * 5 for name in ALLOCATION_RANGES},
        strength={layer: dict.fromkeys(ALLOCATION_RANGES, strength) for layer in ("layer0", "layer1", "all")},
        constant=dict.fromkeys(ALLOCATION_RANGES, 0),
        per_image={what: dict.fromkeys(ALLOCATION_RANGES, tuple(row.tolist())) for what, row in values.items()},
        images=IMAGES,
        times=ALLOCATION_TIMES,
        split="unseen",
    )


def routing(shift: float = 0.0) -> RoutingSheet:
    """Return the content of a routing sheet of two images."""
    g = torch.Generator().manual_seed(1)
    return RoutingSheet(
        images=torch.rand(2, 3, 32, 32, generator=g) * 2 - 1,
        saliency=torch.rand(2, 16, generator=g),
        foreground=torch.full((2, 16), torch.nan),
        experts=torch.rand(2, len(ALLOCATION_TIMES), 16, generator=g) + shift,
        times=ALLOCATION_TIMES,
        captions=(f"a {NASTY}", "a house"),
    )


def write_run(folder: Path, steps: int = 6, shift: float = 0.1, wait: float = 0.01, **settings: Any) -> Path:
    """Write a complete run folder with figures of `steps` steps and return it."""
    given = {"name": folder.name, "stage": "posttrain", "model.router": "diffmoe", "model.saliency_router": True}
    given |= {"train.steps": steps, "train.global_batch": 8, "world": 1, "device": "cpu", "version.torch": "2"}
    given |= {"sample.captions": [NASTY]} | settings
    start = {"event": "start", "run": "a", "step": 0, "time": "T", "settings": given}
    lines: list[Mapping[str, Any]] = [start, {"event": "warning", "run": "a", "step": 1, "text": f"note: {NASTY}"}]
    lines += [{"run": "a", "step": step, **_figures(step, wait)} for step in range(1, steps + 1)]
    lines.append({"run": "a", "step": steps, "validation/flow": 0.4, "validation/flow_t0.5": 0.3})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"name: '{NASTY}'\n")
    for number, name in enumerate(("before", "after")):
        allocation(number * shift).save(folder / "allocation" / f"{name}.json")
        stem = f"step{number * steps:08}"
        routing(number).save(folder / "routing" / f"{stem}.npz")
        pixels = sample_grid(routing(number).images, routing().captions)
        save_png(pixels, folder / "routing" / f"{stem}.png")
        save_png(pixels, folder / "samples" / f"{stem}.png")
    return folder


def _figures(step: int, wait: float) -> dict[str, float]:
    """Return the figures of one step."""
    layers = {
        f"{what}/layer{layer}": 0.1 * (layer + 1)
        for layer in range(2)
        for what in ("routing_load_max", "routing_load_min", "routing_flipped", "saliency_spread_t>0.65")
    }
    return {
        "loss/total": 1.0 / step,
        "loss/flow": 0.9 / step,
        "loss/balance": 0.0,
        "optim/lr": 1e-3,
        "throughput/images_per_second": 8.0 + step % 2,
        "throughput/data_wait_share": wait + 0.01 * (step % 2),
        "memory/peak_mib": 100.0,
        "flops/per_image/dense": 3e9,
        "flops/per_image/routed": 1e9,
        "routing_dead_experts/layer0": 0.0,
        "routing_dead_experts/layer1": 0.0,
        **layers,
    }
