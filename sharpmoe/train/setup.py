"""What is known and checked before a run does real work. Pure on every rank: nothing here communicates."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.index import Bucket
from data_pipeline.read.mixture import Mixture, open_mixture
from data_pipeline.read.shards import ShardSet
from sharpmoe.checkpoint import load
from sharpmoe.checkpoint.manifest import Layout, Manifest, Progress
from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout, batch_arithmetic
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.model.dit import DiT
from sharpmoe.model.weights import StartingWeights
from sharpmoe.parallel.experts.groups import check_ep_size
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train.rollout_schedules import check_schedule
from sharpmoe.train.step import EmptyText


class Data(NamedTuple):
    """The two splits of a run and the embedding of the empty caption."""

    train: Mixture
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
    saved: Manifest | None  # checkpoint to go on from
    found: load.Found = load.Found()  # that one, and others should it be damaged
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.run.output) / self.run.name

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.ds_config["zero_optimization"]["stage"])

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def start(self) -> Progress:
        """How far the run is already."""
        return Progress(0, 0) if self.saved is None else self.saved.progress


class Initial(NamedTuple):
    """The model a run starts from, before the engine takes it."""

    model: DiT  # on the meta device: it may be too large for one rank
    weights: StartingWeights  # its values
    notes: tuple[str, ...]  # what the user should know


def make_plan(run: RunConfig, ds_config: dict[str, Any], world: World, notes: tuple[str, ...] = ()) -> Plan:
    """Check everything that can be checked without a model: data, batch, checkpoint. `notes` go before its own.

    Raises ConfigError, DataError, CheckpointError.
    """
    check_ep_size(run, world.size)
    _check_output(Path(run.output) / run.name)
    batch = batch_arithmetic(run, world.size)
    check_schedule(run, batch.micro_batch)
    data = open_data(run)
    layout = load.layout_of(run, data.train.fingerprint)
    plan = Plan(run, ds_config, batch, data, layout, None, notes=notes)
    found = load.find(plan.checkpoints, run.checkpoint.resume)
    return _going_on_from(next(iter(found.readable), None), plan._replace(found=found))


def _check_output(folder: Path) -> None:
    """Raise ConfigError where the run folder could not be made or written: found before the first step, not after."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "cannot be written to" if there.is_dir() else "is not a folder"
        raise ConfigError(f"output: {folder} cannot be made: {there} {reason}; set output to a folder of your own")


def settle(plan: Plan, world: World) -> Plan:
    """Have a plan go on from a checkpoint whose every file is sound. Communicates; see `load.choose`."""
    choice = load.choose(plan.found, plan.checkpoints, plan.run.checkpoint.resume, world)
    return _going_on_from(choice.saved, plan._replace(notes=(*plan.notes, *choice.notes)))


def _going_on_from(saved: Manifest | None, plan: Plan) -> Plan:
    if saved is not None:
        load.check_fits(saved, plan.run.model, plan.layout)
    return plan._replace(saved=saved)


def open_data(run: RunConfig) -> Data:
    """Open both splits and check that they fit the model. Raises DataError."""
    data = run.data
    remote = data.remote.options()
    train = open_mixture(data.places, data.train_split, remote, accept_damage=data.max_bad_fraction > 0)
    for bucket in train.buckets.values():
        _check_bucket(train, bucket, run)
    return Data(train, ShardSet.open(data.first_place, data.validation_split, remote), train.empty_text())


def _check_bucket(train: Mixture, bucket: Bucket, run: RunConfig) -> None:
    channels, height, width = bucket.latent
    model = run.model
    size: object = math.isqrt(height * width)
    if size != model.latent_size or bucket.grid[0] * bucket.grid[1] != model.num_tokens:
        size = height if height == width else f"{height}x{width}"
    checks: list[tuple[str, object, object]] = [
        ("latent_channels", channels, model.latent_channels),
        ("patch_size", height // bucket.grid[0], model.patch_size),
        ("latent_size", size, model.latent_size),
    ]
    if model.conditioning == "text":
        checks += [("text_width", train.text_width, model.text_width)]
        checks += [("pooled_width", train.pooled_width, model.pooled_width)]
    for name, there, here in checks:
        if there != here:
            raise DataError(
                f"{run.data.first_place}: made for model.{name} {there}, the run has {here}; set model.{name} to "
                f"{there}, or prepare the data with another codec or encoder"
            )


def initial_model(plan: Plan) -> Initial:
    """Plan the model: seeded weights, or those of load.init unless the run goes on from a checkpoint.

    Raises CheckpointError where load.init is of another architecture, DataError where it was trained on latents
    or texts of another kind.
    """
    with torch.device("meta"):
        model = DiT(plan.run.model)
    init = plan.run.checkpoint.init
    if init is None or plan.saved is not None:
        return Initial(model, StartingWeights(plan.run.model, plan.run.seed), ())
    weights = StartingWeights(plan.run.model, plan.run.seed, init)
    return Initial(model, weights, origin_notes(weights.meta, plan.data.origin(), init, plan.run.data.first_place))


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
