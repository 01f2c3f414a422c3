"""The model card of an exported model: README.md with what its weights and its run folder say, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.read.shards import SplitPart
from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.evaluation.allocation import Allocation
from sharpmoe.evaluation.allocation_table import allocation_table
from sharpmoe.log_file import LOG_FILE, read_log, read_log_lines
from sharpmoe.report.runs import SavedModel

_UNKNOWN = "not recorded"
_TABLES = ("before", "after")  # of allocation/ in a run folder
_TASKS = {"text": "text-to-image"}  # by what a model is conditioned on; the Hub has no name for others

_PAGE = """\
---
library_name: diffusers
{task}license: other  # replace with the licence that you choose, which the licences of data and base must allow
tags: [sharpmoe, mixture-of-experts, rectified-flow]
---

# {name}

{title}; {parameters}. Latents {latents}. {router}

## Use

The network is in the package `sharpmoe`, which this folder names and does not copy: install it from its repository.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)
pipe({prompt}).images[0].save("drawn.png")
```

The pipeline passes the clean prediction of each step to the saliency routers of the next one. Without diffusers:
`sharpmoe.sample(sharpmoe.load("FOLDER"), {prompt})`, which draws the same images. The
commands `sample` and `evaluate`, and `checkpoint.init` of a run, take the folder too.

{needs}

## Training

{training}

## Data

{data}

## Experts per token before and after

{allocation}

## Protocol of the figures

{protocol}

## Licence

Not chosen yet: the author of the upload names it here and in the first lines of this file.
"""


def model_card(
    saved: SavedModel, config: ModelConfig, meta: Mapping[str, str], origin: Mapping[str, str], counts: tuple[int, int]
) -> str:
    """Return the text of README.md.

    meta: the header of the weights; origin: their codec and text encoder; counts: parameters, all and active per token.
    Paths are named by their last part: those of the author's machine say nothing to others.
    """
    is_text = config.conditioning == "text"
    run, folder = saved.run, saved.folder
    codec, encoder = (json.loads(origin[key]) if key in origin else None for key in ("codec", "encoder"))
    return _PAGE.format(
        task=f"pipeline_tag: {_TASKS[config.conditioning]}\n" if config.conditioning in _TASKS else "",
        name=folder.resolve().name,
        title=config.title,
        parameters=f"{counts[0] / 1e6:.3f} million parameters, {counts[1] / 1e6:.3f} million active per token",
        latents=" x ".join(map(str, config.shape_of_latent())),
        router=f"Router family `{config.router}`, {'with' if config.saliency_router else 'without'} saliency routers.",
        prompt='"a red apple"' if is_text else "0",
        needs=_needs(codec, encoder if is_text else None),
        training=_rows(_training(run, folder, meta)),
        data=_rows(_data(run, codec, encoder if is_text else None)),
        allocation=_allocation(folder) if run is not None else _UNKNOWN,
        protocol=_rows(_protocol(run, folder)),
    )


def local_places(origin: Mapping[str, str]) -> list[str]:
    """Return the absolute paths by which an origin names codec and text encoders: nobody else's machine has them."""
    parts = [json.loads(origin[key]) for key in ("codec", "encoder") if key in origin]
    return [name for part in parts for name in _names(part) if Path(name).is_absolute()]


def _rows(rows: Mapping[str, object]) -> str:
    found = {name: _UNKNOWN if value in (None, "") else value for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in found.items())])


def _needs(codec: Mapping[str, Any] | None, encoder: Mapping[str, Any] | None) -> str:
    """Return what must be there to draw: what travels in the folder, and what is only named."""
    named = [each for part in (codec, encoder) if part is not None for each in _names(part)]
    lines = [f"Codec: {_identity(codec)}. Its identity and, where it was fitted, its numbers are in the folder."]
    if encoder is not None:
        lines.append(f"Text encoder: {_identity(encoder)}.")
    if named:
        places = ", ".join(f"{name!r}: ..." for name in named)
        lines.append(
            f"Not in the folder, and loaded by name: {', '.join(f'`{name}`' for name in named)}; where they are "
            f"elsewhere, `from_pretrained(..., places={{{places}}})` says where. Other weights are refused."
        )
    return " ".join(lines)


def _names(identity: Mapping[str, Any]) -> list[str]:
    """Return the names of networks in an identity, in its parts too."""
    parts = [identity, *identity.get("encoders", ())]
    return [str(part["name"]) for part in parts if "name" in part]


def _identity(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return _UNKNOWN
    words = [str(identity["kind"]), *(f"`{name}`" for name in _names(identity))]
    return " ".join(words) + (f" (sha256 {str(identity['sha256'])[:12]})" if "sha256" in identity else "")


def _training(run: RunConfig | None, folder: Path, meta: Mapping[str, str]) -> dict[str, object]:
    rows: dict[str, object] = {"optimizer steps": meta.get("step"), "training images seen": meta.get("samples")}
    rows["weights"] = {"ema": "averaged (ema)", "live": "live"}.get(meta.get("weights", ""))
    if run is None:
        return {**rows, "published as": meta["published"]} if "published" in meta else rows
    start = _first_start(folder)
    init = run.checkpoint.init
    return {
        **rows,
        "stage": run.stage,
        "started from": "random values" if init is None else f"`{Path(init).name}`",
        "images per step": run.train.global_batch,
        "steps of a rollout": run.rollout.num_steps if run.stage == "posttrain" else None,
        "weight of the routing loss": run.loss.routing_weight if run.stage == "posttrain" else None,
        "optimizer": f"{run.optim.name}, learning rate {run.optim.lr:g} ({run.optim.schedule})",
        "precision": run.train.precision,
        "seed": run.seed,
        "started": start.get("time"),
        "software": ", ".join(
            f"{name} {start.get('settings', {})[key]}"
            for name in ("sharpmoe", "torch", "deepspeed", "commit")
            if (key := f"version.{name}") in start.get("settings", {})
        ),
    }


def _first_start(folder: Path) -> dict[str, Any]:
    log = folder / LOG_FILE
    lines = read_log_lines(log) if log.is_file() else []
    return next((line for line in lines if line.get("event") == "start"), {})


def _data(
    run: RunConfig | None, codec: Mapping[str, Any] | None, encoder: Mapping[str, Any] | None
) -> dict[str, object]:
    place = None if run is None else f"`{Path(str(run.data.first_place)).name}`, split {run.data.train_split}"
    rows: dict[str, object] = {"training shards": place, "codec": _identity(codec)}
    return rows if encoder is None else {**rows, "text encoder": _identity(encoder)}


def _allocation(folder: Path) -> str:
    """Return the table of the run's two measurements; says which of them is not there."""
    files = {name: folder / "allocation" / f"{name}.json" for name in _TABLES}
    found = {name: Allocation.load(path) for name, path in files.items() if path.is_file()}
    if not found:
        return f"{_UNKNOWN[0].upper()}{_UNKNOWN[1:]} (`log.allocation` of the run)."
    lacking = [name for name in _TABLES if name not in found]
    note = f"\n\n{' and '.join(lacking).capitalize()}: {_UNKNOWN}." if lacking else ""
    return f"```\n{allocation_table(found)}\n```{note}"


def _protocol(run: RunConfig | None, folder: Path) -> dict[str, object]:
    """Return how the figures were measured, and the held-out flow loss at both ends of the run."""
    if run is None:
        return {"held-out flow loss": None, "sampling": None}
    curve = read_log(folder / LOG_FILE).get("validation/flow", {}) if (folder / LOG_FILE).is_file() else {}
    ends = [f"{curve[step]:.4f} (step {step})" for step in dict.fromkeys((min(curve), max(curve)))] if curve else []
    sample, split = run.sample, run.data.validation_split
    return {
        "held-out split": f"none: measured on {split}"
        if SplitPart.read(split).split == run.data.train_split
        else split,
        "held-out flow loss": " to ".join(ends),
        "images of the flow loss": f"up to {run.log.validation_images}" if curve else None,
        "allocation": f"up to {run.log.allocation_images} images, fixed noise" if run.log.allocation else None,
        "sampling": f"{sample.method}, {sample.num_steps} steps, guidance {sample.cfg_scale:g}, seed {sample.seed}",
        "FID, GenEval and other benchmarks": None,
    }
