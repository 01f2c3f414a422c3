"""What is known and checked before a run does real work. Pure on every rank: nothing here communicates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.shards import ShardSet
from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout, batch_arithmetic
from sharpmoe.errors import DataError
from sharpmoe.model.dit import DiT
from sharpmoe.model.pretrained import StartingWeights
from sharpmoe.parallel.groups import check_ep_size
from sharpmoe.parallel.launch import World
from sharpmoe.train import checkpoint
from sharpmoe.train.checkpoint import Layout, Progress
from sharpmoe.train.schedules import check_schedule
from sharpmoe.train.step import EmptyText


class Data(NamedTuple):
    """The two splits of a run and the embedding of the empty caption."""

    train: ShardSet
    held_out: ShardSet
    empty_text: EmptyText

    def origin(self) -> dict[str, str]:
        """Identities of codec and text encoder, for the header of weights trained on these latents and texts."""
        return {"codec": json.dumps(self.train.codec), "encoder": json.dumps(self.train.encoder)}


class Plan(NamedTuple):
    """A run, its data and where it starts; the same on every rank."""

    run: RunConfig
    ds_config: dict[str, Any]
    batch: BatchLayout
    data: Data
    layout: Layout
    saved: checkpoint.Saved | None  # checkpoint to go on from

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.run.output) / self.run.name

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.ds_config["zero_optimization"]["stage"])

    @property
    def start(self) -> Progress:
        """How far the run is already."""
        return Progress(0, 0) if self.saved is None else self.saved.progress


class Initial(NamedTuple):
    """The model a run starts from, before the engine takes it."""

    model: DiT  # on the meta device: it may be too large for one rank
    weights: StartingWeights  # its values
    notes: tuple[str, ...]  # what the user should know


def make_plan(run: RunConfig, ds_config: dict[str, Any], world: World) -> Plan:
    """Check everything that can be checked without a model: data, batch, checkpoint.

    Raises ConfigError, DataError, CheckpointError.
    """
    check_ep_size(run, world.size)
    batch = batch_arithmetic(run, world.size)
    check_schedule(run, batch.micro_batch)
    data = open_data(run)
    layout = checkpoint.layout_of(run, data.train.fingerprint)
    folder = checkpoint.resume_folder(Path(run.output) / run.name / "checkpoints", run.checkpoint.resume)
    saved = None if folder is None else checkpoint.read_meta(folder)
    if saved is not None:
        checkpoint.check_fits(saved, run.model, layout)
    return Plan(run, ds_config, batch, data, layout, saved)


def open_data(run: RunConfig) -> Data:
    """Open both splits and check that they fit the model. Raises DataError."""
    train = ShardSet.open(run.data.shards, run.data.train_split)
    model = run.model
    checks: list[tuple[str, object, object]] = [
        ("latent_channels", train.latent_shape[0], model.latent_channels),
        ("latent_size", train.latent_shape[1], model.latent_size),
        ("patch_size", train.latent_shape[1] // train.grid[0], model.patch_size),
    ]
    if model.conditioning == "text":
        checks += [("text_width", train.text_width, model.text_width)]
        checks += [("pooled_width", train.pooled_width, model.pooled_width)]
    for name, there, here in checks:
        if there != here:
            raise DataError(
                f"{run.data.shards}: made for model.{name} {there}, the run has {here}; set model.{name} to {there}, "
                "or prepare the data with another codec or encoder"
            )
    return Data(train, ShardSet.open(run.data.shards, run.data.validation_split), train.empty_text())


def initial_model(plan: Plan) -> Initial:
    """Plan the model: seeded weights, or those of checkpoint.init unless the run goes on from a checkpoint.

    Raises CheckpointError where checkpoint.init is of another architecture, DataError where it was trained on latents
    or texts of another kind.
    """
    with torch.device("meta"):
        model = DiT(plan.run.model)
    init = plan.run.checkpoint.init
    if init is None or plan.saved is not None:
        return Initial(model, StartingWeights(plan.run.model, plan.run.seed), ())
    weights = StartingWeights(plan.run.model, plan.run.seed, init)
    return Initial(model, weights, origin_notes(weights.meta, plan.data.origin(), init, plan.run.data.shards))


def origin_notes(meta: Mapping[str, str], origin: Mapping[str, str], weights: str, shards: str) -> tuple[str, ...]:
    """Compare the codec and encoder that weights were trained with to those of the shards (`Data.origin`).

    Settings must agree (DataError). A fitted part that differs in its numbers alone is a note: another processor may
    have rounded the same fit differently. Weights that do not tell where they come from pass.
    """
    notes = []
    for what in ("codec", "encoder"):
        if what not in meta:
            continue
        there, here = json.loads(meta[what]), json.loads(origin[what])
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) == here.get(key):
                continue
            difference = f"{weights}: trained with {what} {key} {there.get(key)!r}, {shards} has {here.get(key)!r}"
            if key != "sha256":
                raise DataError(f"{difference}; prepare the data with the {what} of the weights")
            notes.append(f"{difference}: the same settings, another fit; see that the loss of the first step is low")
    return tuple(notes)
