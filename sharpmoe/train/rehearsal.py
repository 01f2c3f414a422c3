"""A dry run: everything that can be checked before the first step, and the banner; no weights are made."""

from pathlib import Path
from typing import Any

import torch

from data_pipeline.index import INDEX_FILE
from data_pipeline.safety import scheme_of
from sharpmoe.config import RunConfig
from sharpmoe.config_io import batch_arithmetic
from sharpmoe.model.dit import DiT
from sharpmoe.model.weights import check_architecture, read_header
from sharpmoe.parallel.experts.groups import check_ep_size
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train.banner import banner
from sharpmoe.train.setup import make_plan


def rehearse(run: RunConfig, ds_config: dict[str, Any], world: World, notes: tuple[str, ...] = ()) -> str:
    """Check a run and return its banner, with `notes` and one more for each thing that is not there yet.

    Data and initial weights that are there must fit (ConfigError, DataError, CheckpointError); a recipe may be
    rehearsed before its data are prepared. No communication.
    """
    told = [*notes]
    layout = batch_arithmetic(run, world.size)
    check_ep_size(run, world.size)
    local = [Path(place) for place, _ in run.data.places if scheme_of(place) is None]
    missing = [folder for folder in local if not (folder / INDEX_FILE).is_file()]
    told += [f"{folder} is not prepared yet: not checked against the model" for folder in missing]
    if not missing:
        make_plan(run, ds_config, world)
    init = run.checkpoint.init
    if init is not None and Path(init).is_file():
        check_architecture(read_header(init)[0], run.model, init)
    elif init is not None:
        told.append(f"{init} is not there yet: not checked against the model")
    with torch.device("meta"):
        model = DiT(run.model)
    stage = int(ds_config["zero_optimization"]["stage"])
    return "\n".join([banner(run, model, layout, stage, world), *(f"  note: {note}" for note in told)])
