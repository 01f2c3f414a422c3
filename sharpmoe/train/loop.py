"""A run from the first line to the last: build, go on from a checkpoint, step, look, save."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.schema import Batch
from data_pipeline.shards import ShardSet
from data_pipeline.stream import stream
from sharpmoe.config import RunConfig
from sharpmoe.config_io import BatchLayout, batch_arithmetic, dump_run_config
from sharpmoe.errors import DataError
from sharpmoe.evaluation.held_out import Share
from sharpmoe.evaluation.validation import scalars, validate
from sharpmoe.model.dit import DiT
from sharpmoe.model.pretrained import load_into
from sharpmoe.parallel.engine import Engine
from sharpmoe.parallel.launch import World, sum_over_ranks, together
from sharpmoe.train import checkpoint
from sharpmoe.train.banner import banner
from sharpmoe.train.checkpoint import Layout, Progress
from sharpmoe.train.ema import ShardEma
from sharpmoe.train.metrics import RunLog, StepStats, due, routing_scalars
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import EmptyText, StepResult, prepare, train_step


class Data(NamedTuple):
    """The two splits of a run and the embedding of the empty caption."""

    train: ShardSet
    held_out: ShardSet
    empty_text: EmptyText


class Plan(NamedTuple):
    """Everything that is known before a process group does real work; the same on every rank."""

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
        """ZeRO stage."""
        return self.layout.stage


class Session(NamedTuple):
    """The moving parts of a run."""

    plan: Plan
    world: World
    objective: Objective
    engine: Engine
    ema: ShardEma
    log: RunLog | None  # rank 0 only


def make_plan(run: RunConfig, ds_config: dict[str, Any], world: World) -> Plan:
    """Check everything that can be checked without a model: data, batch, checkpoint. No communication.

    Raises ConfigError, DataError, CheckpointError.
    """
    data = open_data(run)
    stage = int(ds_config["zero_optimization"]["stage"])
    layout = checkpoint.layout_of(run, stage, world.size, data.train.fingerprint)
    folder = checkpoint.resume_folder(Path(run.output) / run.name / "checkpoints", run.checkpoint.resume)
    saved = None if folder is None else checkpoint.read_meta(folder)
    if saved is not None:
        checkpoint.check_fits(saved, run.model, layout)
    return Plan(run, ds_config, batch_arithmetic(run, world.size), data, layout, saved)


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
                f"{run.data.shards}: made for model.{name} {there}, the run has {here}; set model.{name} to {there}, or "
                "prepare the data with another codec or encoder"
            )
    return Data(train, ShardSet.open(run.data.shards, run.data.validation_split), train.empty_text())


def build_model(plan: Plan) -> DiT:
    """Make the model: seeded initial weights, overwritten by checkpoint.init unless the run goes on from a checkpoint."""
    torch.manual_seed(plan.run.seed)
    model = DiT(plan.run.model)
    if plan.run.checkpoint.init is not None and plan.saved is None:
        load_into(model, plan.run.checkpoint.init)
    return model


def train(plan: Plan, world: World, dry_run: bool = False) -> Path | None:
    """Run a plan to its last step; returns the last checkpoint's folder, None after a dry run or with nothing to do.

    Communicates. Raises SharpMoEError on every rank.
    """
    run = plan.run
    with together(world):
        model = build_model(plan)
    if world.is_main:
        print(banner(run, model, plan.batch, plan.stage, world), flush=True)
    if dry_run:
        return None
    progress = Progress(0, 0) if plan.saved is None else plan.saved.progress
    if progress.step >= run.train.steps:
        return _nothing_to_do(plan, world)
    session = _start(plan, world, model, progress)
    folder = _steps(session, progress)
    if session.log is not None:
        session.log.say(f"done: {folder}")
        session.log.close()
    return folder


def _nothing_to_do(plan: Plan, world: World) -> Path:
    assert plan.saved is not None
    if world.is_main:
        print(f"nothing to do: {plan.saved.folder} is at step {plan.saved.progress.step} of {plan.run.train.steps}")
    return plan.saved.folder


def _start(plan: Plan, world: World, model: DiT, progress: Progress) -> Session:
    """Partition the model, load the checkpoint, open the log."""
    run = plan.run
    objective = Objective(model, run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema = ShardEma(engine, run.optim.ema_decay)
    if plan.saved is not None:
        checkpoint.load(plan.saved, engine, ema)
    log = None
    if world.is_main:
        log = RunLog(plan.folder, run.train.steps, progress.step + 1, run.log.every)
        (plan.folder / "config.yaml").write_text(dump_run_config(run), encoding="utf-8")
        (plan.folder / "zero.json").write_text(json.dumps(plan.ds_config, indent=2), encoding="utf-8")
        if plan.saved is not None:
            log.say(f"going on from {plan.saved.folder}")
    return Session(plan, world, objective, engine, ema, log)


def _steps(session: Session, progress: Progress) -> Path:
    plan, world, run = session.plan, session.world, session.plan.run
    batches = _batches(session, progress)
    folder = None
    for step in range(progress.step, run.train.steps):
        began = time.monotonic()
        with together(world):
            items = prepare(next(batches), plan.data.empty_text, run, world.device)
        waited = time.monotonic() - began
        done = step + 1
        with_routing = done in (progress.step + 1, run.train.steps) or due(done, run.log.every)
        result = train_step(session.engine, session.objective, session.ema, items, step, with_routing)
        _log_step(session, done, result, time.monotonic() - began, waited)
        _look(session, done)
        progress = Progress(done, progress.samples + plan.batch.global_batch)
        if done == run.train.steps or (run.checkpoint.every and done % run.checkpoint.every == 0):
            folder = save(session, progress)
    assert folder is not None  # the last step saves
    return folder


def _batches(session: Session, progress: Progress) -> Iterator[tuple[Batch, ...]]:
    plan, world = session.plan, session.world
    return stream(
        plan.data.train,
        seed=plan.run.seed,
        global_batch=plan.batch.global_batch,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
        start=progress.samples,
        num_workers=plan.run.data.num_workers,
    )


def _log_step(session: Session, step: int, result: StepResult, seconds: float, waited: float) -> None:
    if session.log is None:
        return
    run, images = session.plan.run, session.plan.batch.global_batch
    times = 1 if run.stage == "pretrain" else run.rollout.num_steps
    tokens = images * times * run.model.num_tokens
    stats = StepStats(step, result.losses, result.grad_norm, result.lr, images, tokens, seconds, waited)
    session.log.step(stats, None if result.routing is None else routing_scalars(result.routing))


def _look(session: Session, step: int) -> None:
    """Measure the held-out flow loss of the EMA weights where it is due. Every rank takes part."""
    run, world = session.plan.run, session.world
    if not due(step, run.log.validate_every) and step != run.train.steps:
        return
    share = Share(world.rank, world.size, lambda table: sum_over_ranks(table, world))
    twin = ema_model(session)
    result = validate(twin, session.plan.data.held_out, images=run.log.validation_images, share=share)
    if session.log is not None:
        session.log.scalars(step, scalars(result))


def ema_model(session: Session) -> DiT:
    """Build a plain model with the averaged weights on every rank, in eval mode: looks need no engine. Communicates.

    It takes 4 bytes per parameter for as long as it lives. Running the partitioned module outside of the engine's forward
    would make DeepSpeed record a parameter order without end, and every call slower than the one before.
    """
    state = session.ema.full_weights(session.objective.model, everywhere=True)
    with torch.device("meta"):
        twin = DiT(session.plan.run.model)
    twin.load_state_dict(state, assign=True)
    return twin.eval()


def save(session: Session, progress: Progress) -> Path:
    """Write a checkpoint of a session. Communicates; raises CheckpointError on every rank."""
    plan = session.plan
    root, keep = plan.folder / "checkpoints", plan.run.checkpoint.keep
    return checkpoint.save(root, progress, plan.layout, session.engine, session.ema, session.objective.model, keep)
