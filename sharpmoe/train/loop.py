"""A run from the first line to the last: build, go on from a checkpoint, step, look, save."""

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.schedule import Start
from data_pipeline.stream import Loaded, stream
from sharpmoe.config_io import dump_run_config
from sharpmoe.evaluation.held_out import Share
from sharpmoe.model.dit import DiT
from sharpmoe.parallel.engine import Engine
from sharpmoe.parallel.launch import World, sum_over_ranks, together
from sharpmoe.train import checkpoint
from sharpmoe.train.bad_samples import BadSamples
from sharpmoe.train.banner import banner
from sharpmoe.train.checkpoint import Progress
from sharpmoe.train.ema import ShardEma
from sharpmoe.train.looks import Looks, look, look_before, make_looks
from sharpmoe.train.metrics import RunLog, StepStats, due, routing_scalars
from sharpmoe.train.objective import Objective
from sharpmoe.train.plan import Initial, Plan, initial_model
from sharpmoe.train.step import StepResult, prepare, train_step


class Session(NamedTuple):
    """The moving parts of a run."""

    plan: Plan
    world: World
    objective: Objective
    engine: Engine
    ema: ShardEma
    looks: Looks

    @property
    def log(self) -> RunLog | None:
        """The run's log, on rank 0."""
        return self.looks.log


def train(plan: Plan, world: World) -> Path:
    """Run a plan to its last step; returns the last checkpoint's folder.

    Communicates. Raises SharpMoEError on every rank.
    """
    with together(world):
        initial = initial_model(plan)
    if world.is_main:
        print(banner(plan.run, initial.model, plan.batch, plan.layout.stage, world), flush=True)
    if plan.saved is not None and plan.start.step >= plan.run.train.steps:
        if world.is_main:
            print(f"nothing to do: {plan.saved.folder} is at step {plan.start.step} of {plan.run.train.steps}")
        return plan.saved.folder
    session = open_session(plan, world, initial)
    folder = _steps(session)
    if session.log is not None:
        session.log.say(f"done: {folder}")
        session.log.close()
    return folder


def open_session(plan: Plan, world: World, initial: Initial) -> Session:
    """Partition the model, load the checkpoint, open the log. Communicates; raises SharpMoEError on every rank."""
    objective = Objective(initial.model, plan.run)
    engine = Engine(objective, plan.run, plan.ds_config, world)
    ema = ShardEma(engine, plan.run.optim.ema_decay)
    if plan.saved is not None:
        checkpoint.load(plan.saved, engine, ema)
    share = Share(world.rank, world.size, lambda table: sum_over_ranks(table, world))
    with together(world):
        log = _open_log(plan, [*initial.notes, *engine.notes]) if world.is_main else None
        looks = make_looks(plan.run, plan.data.held_out, plan.folder, world.device, share, log)
    return Session(plan, world, objective, engine, ema, looks)


def _open_log(plan: Plan, notes: Sequence[str]) -> RunLog:
    log = RunLog(plan.folder, plan.run.train.steps, plan.start.step + 1, plan.run.log.every)
    (plan.folder / "config.yaml").write_text(dump_run_config(plan.run), encoding="utf-8")
    (plan.folder / "zero.json").write_text(json.dumps(plan.ds_config, indent=2), encoding="utf-8")
    if plan.saved is not None:
        log.say(f"going on from {plan.saved.folder}")
    for note in notes:
        log.say(f"note: {note}")
    return log


def _steps(session: Session) -> Path:
    plan, world, run = session.plan, session.world, session.plan.run
    batches = _batches(session)
    build = partial(ema_model, session)
    if plan.start.step == 0:
        look_before(session.looks, build)
    bad = BadSamples(plan, world, session.log)
    folder = None
    for step in range(plan.start.step, run.train.steps):
        began = time.monotonic()
        with together(world):
            loaded = next(batches)
            came = time.monotonic()
            items = prepare(loaded.batches, plan.data.empty_text, run, world.device)
            preparing = time.monotonic() - came
        waited = time.monotonic() - began - preparing  # until the slowest rank had its samples
        done = step + 1
        bad.agree(loaded.damage, done)
        with_routing = done in (plan.start.step + 1, run.train.steps) or due(done, run.log.every)
        result = train_step(session.engine, session.objective, session.ema, items, step, with_routing)
        _log_step(session, done, result, time.monotonic() - began, waited)
        look(session.looks, build, done)
        if done == run.train.steps or (run.checkpoint.every and done % run.checkpoint.every == 0):
            folder = save(session, Progress(done, *loaded.consumed))
    assert folder is not None  # the last step saves
    return folder


def _batches(session: Session) -> Iterator[Loaded]:
    plan, world = session.plan, session.world
    return stream(
        plan.data.train,
        seed=plan.run.seed,
        global_batch=plan.batch.global_batch,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
        start=Start(plan.start.samples, plan.start.streams),
        num_workers=plan.run.data.num_workers,
        max_bad_fraction=plan.run.data.max_bad_fraction,
    )


def _log_step(session: Session, step: int, result: StepResult, seconds: float, waited: float) -> None:
    if session.log is None:
        return
    run, images = session.plan.run, session.plan.batch.global_batch
    times = 1 if run.stage == "pretrain" else run.rollout.num_steps
    tokens = images * times * run.model.num_tokens
    stats = StepStats(step, result.losses, result.grad_norm, result.lr, images, tokens, seconds, waited)
    session.log.step(stats, None if result.routing is None else routing_scalars(result.routing))


def ema_model(session: Session) -> DiT:
    """Build a plain model with the averaged weights on every rank, in eval mode: looks need no engine. Communicates.

    It takes 4 bytes per parameter for as long as it lives. Running the partitioned module outside of the engine's
    forward would make DeepSpeed record a parameter order without end, and every call slower than the one before.
    """
    state = session.ema.full_weights(session.objective.model, everywhere=True)
    with torch.device("meta"):
        twin = DiT(session.plan.run.model)
    twin.load_state_dict(state, assign=True)
    return twin.eval()


def save(session: Session, progress: Progress) -> Path:
    """Write a checkpoint of a session. Communicates; raises CheckpointError on every rank."""
    plan = session.plan
    contents = checkpoint.Contents(session.engine, session.ema, session.objective.model, plan.data.origin())
    return checkpoint.save(plan.folder / "checkpoints", progress, plan.layout, contents, plan.run.checkpoint.keep)
