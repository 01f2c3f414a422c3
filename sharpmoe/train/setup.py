"""Everything known and checked before a run starts: its plan, its data, its initial model.

Only `choose_checkpoint` communicates.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.encode.like import is_fitted, origin_header, same_fit
from data_pipeline.read.mixture import Mixture, open_mixture
from data_pipeline.read.shards import ShardSet, SplitPart
from sharpmoe.checkpoint.load import Found
from sharpmoe.checkpoint.manifest import Manifest, Progress, RunIdentity
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout, batch_arithmetic
from sharpmoe.durable import sha256_of, takes_files
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.invocation import spell_command
from sharpmoe.log_file import LOG_FILE
from sharpmoe.model.adapters import Adapters, plain_name
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.compiled import check_compiler
from sharpmoe.model.trainable import check_trained, planned_model
from sharpmoe.model.weights import StartingWeights
from sharpmoe.parallel.experts.groups import check_ep_size
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.trackers.registry import check_trackers
from sharpmoe.train.callbacks import check_callbacks
from sharpmoe.train.labels import check_training_labels
from sharpmoe.train.looks import check_looks
from sharpmoe.train.monitor import measures
from sharpmoe.train.rollout_schedules import check_schedule
from sharpmoe.train.shapes import shape_mismatch, token_counts
from sharpmoe.train.trajectories import EmptyText

# What a run needs to write in its folder, beside pictures and tables, which may fail.
_FILES = (LOG_FILE, "config.yaml", "zero.json")
_COMPARED, _FEW = 2**16, 8  # elements of tensors that are all compared to recognise a base; of larger ones, how many
_ROUNDING = 1e-5  # relative: another processor may merge with another rounding
_FOLDERS = ("checkpoints", "tensorboard")


class RunData(NamedTuple):
    """The two splits of a run and the embedding of the empty caption."""

    train: Mixture
    held_out: ShardSet | None  # None where the run measures nothing
    empty_text: EmptyText

    def origin(self) -> dict[str, str]:
        """Return the codec and text encoder of these data for the header of weights that are trained on them.

        Their identities, and the numbers of a fitted codec. Raises DataError where the shards lack the codec.
        """
        return origin_header(self.train)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run, its data and where it starts; the same on every rank but for the notes, which the main rank prints."""

    run: RunConfig
    ds_config: dict[str, Any]
    batch: BatchLayout
    data: RunData
    identity: RunIdentity
    saved: Manifest | None = None  # checkpoint to resume from
    found: Found = field(default_factory=Found)  # that one, and others should it be damaged
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.run.output) / self.run.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def start(self) -> Progress:
        """How far the run is when it starts."""
        return Progress(0, 0) if self.saved is None else self.saved.progress

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint to resume from is at the last step, so that nothing is trained."""
        return self.saved is not None and self.start.step >= self.run.train.steps


class InitialModel(NamedTuple):
    """The model a run starts from, before the engine takes it."""

    model: Backbone  # on the meta device: it may be too large for one rank
    weights: StartingWeights  # its values
    notes: tuple[str, ...]  # what the user should know
    adapters: Adapters | None = None  # of the model, where it has any


def make_plan(
    run: RunConfig,
    ds_config: dict[str, Any],
    world: World,
    notes: tuple[str, ...] = (),
    *,
    readers: World | None = None,
) -> RunPlan:
    """Check everything that can be checked without a model: data, batch, checkpoint. `notes` go before its own.

    readers: the processes that share the reading of labels, where these are not `world` (a dry run for other ranks).
    Raises ConfigError, DataError, CheckpointError.
    """
    check_ep_size(run, world.size)
    check_trackers(run.log.trackers)
    check_callbacks(run.log.callbacks)
    _check_output(Path(run.output) / run.name)
    if run.train.compile:
        check_compiler(world.device)
    batch = batch_arithmetic(run, world.size)
    check_looks(run)
    data = _open_data(run)
    check_schedule(run, batch.micro_batch, token_counts(data.train.buckets))
    check_training_labels(
        run.model, [*data.train.sources, *([] if data.held_out is None else [data.held_out])], readers or world
    )
    identity = RunIdentity.of(run, data.train.fingerprint)
    notes = (*notes, *_held_out_notes(run, data), *_small_bucket_notes(data.train, batch), *_predictor_notes(run))
    plan = RunPlan(run=run, ds_config=ds_config, batch=batch, data=data, identity=identity, notes=notes)
    found = Checkpoints.find(plan.checkpoints, run.checkpoint.resume)
    return _resume(next(iter(found.readable), None), replace(plan, found=found))


def _held_out_notes(run: RunConfig, data: RunData) -> tuple[str, ...]:
    """Return a note where a run measures on what it is trained on."""
    split = run.data.validation_split
    if data.held_out is None or SplitPart.read(split).split != run.data.train_split:
        return ()
    return (
        f"data.validation_split is {split}: what is measured is of pictures that are trained on, and hides memorising",
    )


def _predictor_notes(run: RunConfig) -> tuple[str, ...]:
    """Return a note where saliency routers cannot change the compute of inference."""
    model = run.model
    if not (model.saliency_router and model.family.thresholds == "predicted" and model.capacity_selection == "mask"):
        return ()
    return (
        "model.capacity_selection is mask: in inference the capacity predictor alone chooses, so saliency routers move "
        "gates and no compute; count lets them",
    )


def _small_bucket_notes(train: Mixture, batch: BatchLayout) -> tuple[str, ...]:
    """Return a note where a step takes more samples than its bucket, or the whole split, has."""
    sizes: dict[str, int] = {}
    for stream in train.streams:
        sizes[stream.bucket] = sizes.get(stream.bucket, 0) + stream.num_samples
    small = [f"{name} ({count})" for name, count in sizes.items() if count < batch.global_batch]
    if not small:
        return ()
    if len(sizes) == 1:
        (count,) = sizes.values()
        return (
            f"a step takes {batch.global_batch} samples (train.global_batch), more than the {count} of the training "
            "split, so that it takes some twice: lower it, or prepare more pictures",
        )
    return (
        f"a step takes {batch.global_batch} samples of one bucket (train.global_batch), and these have fewer, so "
        f"that it takes some twice: {', '.join(small)}",
    )


def _check_output(folder: Path) -> None:
    """Raise ConfigError where the run folder could not be made or written: found before the first step, not after.

    Also where a file or folder of an earlier start in it cannot be written any more.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not takes_files(there):
        reason = "cannot be written to" if there.is_dir() else "is not a folder"
        raise ConfigError(f"output: {folder} cannot be made: {there} {reason}; set output to a folder of your own")
    for place in (folder / name for name in (*_FILES, *_FOLDERS) if (folder / name).exists()):
        is_kind, kind = (place.is_file(), "file") if place.name in _FILES else (place.is_dir(), "folder")
        if not is_kind or not os.access(place, os.W_OK):
            reason = "cannot be written to" if is_kind else f"is not a {kind}"
            raise ConfigError(f"output: {place} {reason}; move it away, or give the run a --name of its own")


def choose_checkpoint(plan: RunPlan, world: World) -> RunPlan:
    """Return the plan with a verified checkpoint to resume from. Communicates; see `load.first_sound`."""
    choice = Checkpoints.first_sound(plan.found, plan.checkpoints, plan.run.checkpoint.resume, world)
    return _resume(choice.saved, replace(plan, notes=(*plan.notes, *choice.notes)))


def rehearse_checkpoint(plan: RunPlan) -> RunPlan:
    """Choose as `choose_checkpoint`, alone, and read it as the run would; see `load.rehearse_resume`."""
    model = planned_model(plan.run)
    choice = Checkpoints.rehearse_resume(plan.found, plan.checkpoints, plan.run.checkpoint.resume, model)
    return _resume(choice.saved, replace(plan, notes=(*plan.notes, *choice.notes)))


def _resume(saved: Manifest | None, plan: RunPlan) -> RunPlan:
    if saved is None:
        return plan
    model = planned_model(plan.run)
    check_trained([name for name, _ in model.named_parameters()], plan.run)  # a misspelt pattern is no other run
    try:
        Checkpoints.check_fits(saved, plan.run.model, plan.identity)
        Checkpoints.check_trains_same(saved, model, plan.run)
        _check_base(saved, plan)
    except CheckpointError as error:
        if saved.folder.parent != plan.checkpoints:
            raise
        raise CheckpointError(f"{plan.folder} holds another run; give this one a --name of its own ({error})") from None
    return replace(plan, saved=saved)


def _check_base(saved: Manifest, plan: RunPlan) -> None:
    """Raise CheckpointError where the run's own checkpoint was started from another base than the run names.

    Files at two paths are one base where their contents agree; of a base that is not there any more, nothing is known.
    """
    before, now = saved.settings.get("checkpoint.init"), plan.run.checkpoint.init
    if before == now or saved.folder.parent != plan.checkpoints or "checkpoint.init" not in saved.settings:
        return
    if before is not None and now is not None and not _differ(Path(before), Path(now)):
        return
    raise CheckpointError(
        f"{saved.folder}: checkpoint.init is {before!r} there, {now!r} in the run; set checkpoint.init to the former "
        "to go on"
    )


def _differ(one: Path, other: Path) -> bool:
    """Whether two weights files are known to have different contents."""
    if not one.is_file() or not other.is_file() or one.samefile(other):
        return False
    return one.stat().st_size != other.stat().st_size or sha256_of(one) != sha256_of(other)


def _open_data(run: RunConfig) -> RunData:
    """Open the training split, and the held-out one where something measures; check that they fit. Raises DataError."""
    data = run.data
    remote = data.remote.options()
    train = open_mixture(data.places, data.train_split, remote, accept_damage=data.max_bad_fraction > 0)
    wrong = shape_mismatch(train, run.model)
    if wrong is not None:
        raise DataError(
            f"{data.first_place}: made for model.{wrong.key} {wrong.data}, the run has {wrong.model}; set "
            f"model.{wrong.key} to {wrong.data}, or prepare the data with another codec or encoder"
        )
    if not measures(run):
        return RunData(train, None, train.empty_text())
    _check_held_out_split(run, train.sources[0])
    return RunData(train, ShardSet.open(data.first_place, data.validation_split, remote), train.empty_text())


def _check_held_out_split(run: RunConfig, source: ShardSet) -> None:
    split = run.data.validation_split
    try:
        part = SplitPart.read(split)
    except ValueError as error:
        raise DataError(f"data.validation_split: {error}") from None
    if source.splits.get(part.split, 0) < part.number:
        there = ", ".join(f"{name} ({count})" for name, count in source.splits.items() if count)
        raise DataError(
            f"{source.location}: no samples in split {split!r} (data.validation_split) to measure on; it has {there}; "
            f"set --data.validation_split {run.data.train_split}, or turn measuring off: --log.validate_every 0 "
            "--log.allocation false --log.sample_every 0"
        )


def initial_model(plan: RunPlan) -> InitialModel:
    """Plan the model: seeded weights, or those of checkpoint.init unless the run resumes from a checkpoint.

    A resumed run takes its frozen parameters from the checkpoint's live.safetensors; with adapters, which are merged
    there, from its base. Raises CheckpointError where
    checkpoint.init is of another architecture, DataError where it was trained on latents or texts of another kind,
    ConfigError where a pattern of train.trainable, train.frozen or optim.lr_scale matches no parameter.
    """
    model = planned_model(plan.run)
    check_trained([name for name, _ in model.named_parameters()], plan.run)
    adapters = Adapters.of(model, plan.run.lora)
    init: str | Path | None = plan.run.checkpoint.init
    if plan.saved is not None and adapters is None:
        has_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        init = plan.saved.folder / "live.safetensors" if has_frozen else None
    weights = StartingWeights(plan.run.model, plan.run.seed, init)
    if plan.saved is not None and adapters is not None:
        _check_same_base(plan.saved, weights, model, adapters, plan.run)
    is_base = init is not None and plan.saved is None
    notes = (*_origin_notes(weights.meta, plan.data.train, plan.run), *_frames_note(weights)) if is_base else ()
    return InitialModel(model=model, weights=weights, notes=notes, adapters=adapters)


def _check_same_base(
    saved: Manifest, weights: StartingWeights, model: Backbone, adapters: Adapters, run: RunConfig
) -> None:
    """Raise CheckpointError where the base of an adapted run has changed, by what its checkpoint holds of it.

    Compared are all small frozen tensors and some of the large ones, of experts the first, and of some adapted layers
    the merged weights: those that a run started from another base would have saved.
    """
    live = StartingWeights(run.model, run.seed, saved.folder / "live.safetensors")
    factors = Checkpoints.read_adapters(saved.folder, adapters, "live")
    shapes = {plain_name(name): each.shape for name, each in model.named_parameters() if not each.requires_grad}
    small = [name for name in shapes if name not in adapters.pairs and shapes[name].numel() <= _COMPARED]
    large = [name for name in shapes if name not in adapters.pairs and shapes[name].numel() > _COMPARED]
    for name in (*small, *_spread(large), *_spread(sorted(adapters.pairs))):
        first = range(1) if ".experts." in name else None
        base, found = (values(name, shapes[name], first) for values in (weights, live))
        if name in adapters.pairs:
            base = adapters.merged(base, *(factors[one] for one in adapters.pairs[name]))
        if (base - found).abs().max() > _ROUNDING * found.abs().max():
            raise CheckpointError(
                f"{saved.folder}: its adapters were trained on another base than checkpoint.init "
                f"{run.checkpoint.init!r} ({name} differs); set checkpoint.init to the former, or start a new run from "
                "its live.safetensors, in which they are merged"
            )


def _spread(names: Sequence[str]) -> list[str]:
    """Return a few names, evenly spread."""
    return [*names[:: max(1, len(names) // _FEW)]]


def _frames_note(weights: StartingWeights) -> tuple[str, ...]:
    """Say that a base has seen another number of frames: no tensor depends on it, so it may start the run."""
    there, here = weights.latent_frames, weights.config.latent_frames
    if there is None or there == here:
        return ()
    base = "still images" if there == 1 else f"{there} frames"
    return (
        f"{weights.path}: trained on {base}, the run has {here} frames (model.latent_frames): its tensors are taken as "
        "they are, and it has to learn what the other frames are",
    )


def _origin_notes(meta: Mapping[str, str], data: Mixture, run: RunConfig) -> tuple[str, ...]:
    """Compare the codec and encoder in the header of the run's base with those of the shards.

    Raises DataError where they differ, unless the run accepts it; then it is a note. The same fit with other rounding,
    as another processor gives it, is a note too. Weights without an origin pass.
    """
    notes = []
    for what, here in (("codec", data.codec), ("encoder", data.encoder)):
        there = json.loads(meta[what]) if what in meta else here
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) == here.get(key):
                continue
            weights, shards = run.checkpoint.init, run.data.first_place
            found = f"{weights}: trained with {what} {key} {there.get(key)!r}, {shards} has {here.get(key)!r}"
            if key == "sha256" and is_fitted(data.codec) and what == "codec" and same_fit(meta, data.codec_object()):
                notes.append(f"{found}: the same fit, rounded differently")
            elif run.checkpoint.init_other_codec:
                notes.append(f"{found}: accepted by checkpoint.init_other_codec; the base has to learn them anew")
            else:
                raise DataError(
                    f"{found}, so the base would not understand these latents or texts; prepare the data with "
                    f"`{spell_command('prepare')} --like {weights}`, or accept it with "
                    "--checkpoint.init_other_codec true"
                )
    return tuple(notes)
