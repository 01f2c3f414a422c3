"""The objects of one run - engine, average, monitor, saver - and what needs several of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.checkpoint.save import Checkpoints, Outcome
from sharpmoe.checkpoint.state import Contents
from sharpmoe.config_io import dump_run_config
from sharpmoe.evaluation.held_out import Share
from sharpmoe.model.adapters import Adapters
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.compiled import compile_blocks
from sharpmoe.parallel.ranks import watchdog
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks, sum_over_ranks
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.settings import regather_warnings
from sharpmoe.train import provenance
from sharpmoe.train.callbacks import CallbackCalls, TrainingSave, open_callbacks
from sharpmoe.train.looks import fill_by_block, look_dtype, looks_by_block
from sharpmoe.train.monitor import Monitor
from sharpmoe.train.objective import Objective
from sharpmoe.train.rollout_schedules import schedule_of
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.setup import InitialModel, RunPlan


@dataclass(frozen=True, kw_only=True)
class Session:
    """The objects of a run; made once, on every rank."""

    plan: RunPlan
    world: World
    objective: Objective
    engine: Engine
    ema: ShardEma
    monitor: Monitor
    checkpoints: Checkpoints
    callbacks: CallbackCalls
    adapters: Adapters | None  # of the model, where it has any

    @property
    def log(self) -> RunLog | None:
        """The run's log, on rank 0."""
        return self.monitor.log


def open_session(plan: RunPlan, world: World, initial: InitialModel, callbacks: Sequence[object] = ()) -> Session:
    """Partition the model, load the checkpoint, open the log. Communicates; raises SharpMoEError on every rank.

    callbacks: beside those of log.callbacks; those of rank 0 are called.
    """
    objective = Objective(initial.model, plan.run)
    engine = Engine(objective, plan.run, plan.ds_config, world, objective.values(initial.weights))
    ema = ShardEma(engine, plan.run.optim.ema_decay)
    has_frozen = not all(parameter.requires_grad for parameter in objective.model.parameters())
    contents = Contents(
        engine=engine,
        ema=ema,
        model=objective.model,
        origin=plan.data.origin(),
        frozen=initial.weights if has_frozen else None,
        adapters=initial.adapters,
    )
    settings = provenance.settings(plan.run, plan.ds_config, world) if world.is_main else {}
    root, config = plan.checkpoints, plan.run.checkpoint
    checkpoints = Checkpoints(root, config, contents, identity=plan.identity, settings=settings)
    if plan.saved is not None:
        checkpoints.load(plan.saved)
    share = Share(world.rank, world.size, partial(_sum_of_all, world))
    with raise_on_all_ranks(world):
        uses = schedule_of(plan.run).model_uses * plan.batch.accumulation
        warnings = regather_warnings(plan.ds_config, engine.held_parameters, uses)
        calls = open_callbacks(plan.run.log.callbacks, callbacks) if world.is_main else CallbackCalls({})
        log = _open_log(plan, [*plan.notes, *initial.notes, *warnings], settings) if world.is_main else None
        if plan.run.train.compile:
            compile_blocks(objective.model, partial(_say_and_mark, log))
        agree = partial(raise_on_all_ranks, world)
        monitor = Monitor.open(plan.run, plan.data.held_out, plan.folder, world.device, share, log, agree, calls)
    return Session(
        plan=plan,
        world=world,
        objective=objective,
        engine=engine,
        ema=ema,
        monitor=monitor,
        checkpoints=checkpoints,
        callbacks=calls,
        adapters=initial.adapters,
    )


def _say_and_mark(log: RunLog | None, text: str) -> None:
    """Tell how far compilation is, on rank 0; on every rank it is progress."""
    watchdog.mark()
    if log is not None:
        log.say(text)


def _open_log(plan: RunPlan, notes: Sequence[str], settings: provenance.Settings) -> RunLog:
    config = plan.run.log
    log = RunLog(
        plan.folder,
        plan.run.train.steps,
        plan.start.step + 1,
        config.every,
        settings=settings,
        trackers=config.trackers,
        project=config.project,
    )
    (plan.folder / "config.yaml").write_text(dump_run_config(plan.run), encoding="utf-8")
    (plan.folder / "zero.json").write_text(json.dumps(plan.ds_config, indent=2), encoding="utf-8")
    if plan.saved is not None:
        changed = provenance.changes(plan.saved.settings, settings)
        log.event("resume", plan.start.step, checkpoint=str(plan.saved.folder), changed=changed)
        log.say(f"going on from {plan.saved.folder}; {provenance.changes_text(changed)}")
    for note in notes:
        log.say(f"note: {note}")
    return log


def ema_model(session: Session) -> Backbone:
    """Build a plain model with the averaged weights on every rank, in eval mode, for the monitor. Communicates.

    It takes 4 bytes per parameter for as long as it lives, 2 in bf16, or those of one block (`looks_by_block`). Running
    the partitioned module outside of the engine's forward would make DeepSpeed record parameters without end, and
    every call slower than the one before.
    A signal that asks the run to stop raises StopAskedError from its next call, on every rank.
    """
    if _is_by_block(session):
        return _by_block(session, session.ema.shards)
    return _plain_model(session, session.ema.full_weights(session.objective.model, True, _gathered_dtype(session)))


def live_model(session: Session) -> Backbone:
    """Build the same with the weights that are trained, not their average. Communicates."""
    if _is_by_block(session):
        return _by_block(session, session.engine.state.masters())
    return _plain_model(session, session.engine.full_weights(session.objective.model, True, _gathered_dtype(session)))


def _is_by_block(session: Session) -> bool:
    return looks_by_block(session.plan.run, session.engine.num_parameters)


def _gathered_dtype(session: Session) -> torch.dtype:
    """Return the dtype in which weights are collected: adapters are merged before rounding."""
    return torch.float32 if session.adapters is not None else look_dtype(session.plan.run)


def _by_block(session: Session, shards: Sequence[Tensor]) -> Backbone:
    with torch.device("meta"):
        twin = build_model(session.plan.run.model)
    model = session.objective.model
    twin.load_state_dict({name: x.detach().clone() for name, x in model.named_buffers()}, strict=False, assign=True)
    parts, pieces = session.engine.with_frozen(model, shards)
    fill_by_block(twin, parts, pieces, session.world, look_dtype(session.plan.run))
    twin.register_forward_pre_hook(partial(_stop_on_signal, session.world))
    return twin.eval()


def _plain_model(session: Session, state: dict[str, Tensor]) -> Backbone:
    with torch.device("meta"):
        twin = build_model(session.plan.run.model)
    adapters = session.adapters
    twin.load_state_dict(adapters.merge_state(state) if adapters is not None else state, assign=True)
    twin.to(look_dtype(session.plan.run))
    twin.register_forward_pre_hook(partial(_stop_on_signal, session.world))
    return twin.eval()


def _stop_on_signal(world: World, *_: object) -> None:
    with raise_on_all_ranks(world, stop_on_signal=True):
        pass


def _sum_of_all(world: World, table: Tensor) -> Tensor:
    """Return the sum over all ranks; a rank that has failed before it is met here, and not by another collective."""
    with raise_on_all_ranks(world):
        pass
    return sum_over_ranks(table, world)


def ensure_saved(session: Session, progress: Progress) -> Path:
    """Save a state unless it is on the disk already; returns the folder of its checkpoint.

    Communicates; raises CheckpointError on every rank.
    """
    plan, outcome = session.plan, session.checkpoints.wait()
    log_save(session, outcome)
    if outcome is not None and outcome.error is None and outcome.progress.step == progress.step:
        return outcome.folder
    if plan.saved is not None and plan.run.checkpoint.resume == "auto" and plan.start.step == progress.step:
        session.checkpoints.drop_old(plan.saved.folder)
        return plan.saved.folder
    folder = session.checkpoints.save(progress)
    session.callbacks.on_save(TrainingSave(step=progress.step, checkpoint=folder))
    return folder


def log_save(session: Session, outcome: Outcome | None) -> None:
    """Log a save that ended; one that failed costs the run nothing but that checkpoint."""
    if outcome is None or session.log is None:
        return
    step, error = outcome.progress.step, outcome.error
    seconds = {"stalled": round(outcome.stalled, 3), "seconds": round(outcome.seconds, 3)}
    if error is None:
        session.log.event("save", step, checkpoint=str(outcome.folder), **seconds)
        session.callbacks.on_save(TrainingSave(step=step, checkpoint=outcome.folder))
    else:
        session.log.event("save failed", step, error=str(error), **seconds)
        session.log.say(f"warning: step {step} was not saved, training goes on: {error}")
