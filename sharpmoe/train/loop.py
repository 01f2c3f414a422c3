"""The life of a run: build, resume, step, monitor, save; stop when a signal asks for it."""

import json
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

from data_pipeline.read.schedule import Start
from data_pipeline.read.stream import Loaded, stream
from sharpmoe import durable
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.config import CheckpointConfig, RunConfig
from sharpmoe.devices import deterministic_algorithms, wait_for
from sharpmoe.errors import SharpMoEError
from sharpmoe.parallel.ranks import watchdog
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks, sum_over_ranks
from sharpmoe.parallel.ranks.signals import StopAskedError
from sharpmoe.parallel.zero.settings import zero_title
from sharpmoe.report.page import write_report
from sharpmoe.trackers.mirror import one_line
from sharpmoe.train import faults
from sharpmoe.train.callbacks import CallbackError, TrainingEnd, TrainingStep
from sharpmoe.train.flops import peak_tflops, rows_expected, step_flops
from sharpmoe.train.guard import Watch
from sharpmoe.train.metrics import Effort, StepStats, due, routing_scalars, rows_taken, strength_warning
from sharpmoe.train.owner import run_folder_owned
from sharpmoe.train.provenance import banner
from sharpmoe.train.rollout_schedules import rollout_steps
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.session import Session, ema_model, ensure_saved, live_model, log_save, open_session
from sharpmoe.train.setup import RunPlan, choose_checkpoint, initial_model
from sharpmoe.train.shapes import token_counts
from sharpmoe.train.step import StepResult, train_step
from sharpmoe.train.summary import closing_summary
from sharpmoe.train.target import with_target_scales
from sharpmoe.train.terms import has_routing_loss, routing_weight
from sharpmoe.train.trajectories import DrawnAhead, draw_trajectories

_STOPPED_FILE = "stopped.json"  # in the run folder, after a signal: the run is to be started again


def train(plan: RunPlan, world: World, callbacks: Sequence[object] = ()) -> Path:
    """Run a plan to its last step, or to where a signal stops it; returns the last checkpoint's folder.

    callbacks: see `sharpmoe.train.callbacks`, beside those of log.callbacks; only those of rank 0 are called.
    Communicates. Raises on every rank: SharpMoEError, also where another live process runs in the folder; and, after
    the save, KeyboardInterrupt where SIGINT (Ctrl-C) stopped it. Ends the process with code 3 where a rank is lost.
    """
    with (
        watchdog.watching(world.rank, world.size, plan.run.peers),
        run_folder_owned(plan.folder, world),
        deterministic_algorithms(plan.run.train.deterministic),
    ):
        ended = _train(with_target_scales(choose_checkpoint(plan, world), world), world, callbacks)
    if ended.signal == signal.SIGINT.name:
        raise KeyboardInterrupt
    return ended.folder


class _Ended(NamedTuple):
    """How a run ended."""

    folder: Path  # its last checkpoint
    signal: str = ""  # that stopped it


def _train(plan: RunPlan, world: World, callbacks: Sequence[object]) -> _Ended:
    with raise_on_all_ranks(world):
        initial = initial_model(plan)
        initial.weights.check_finite(world.rank, world.size)
        monitor_first = _monitor_was_cut_off(plan.folder, plan.start.step)
    if world.is_main:
        tokens = token_counts(plan.data.train.buckets)
        print(banner(plan.run, initial.model, plan.batch, zero_title(plan.ds_config), world, tokens), flush=True)
    if plan.saved is not None and plan.start.step >= plan.run.train.steps and not monitor_first:
        if world.is_main:
            print(f"nothing to do: {plan.saved.folder} is at step {plan.start.step} of {plan.run.train.steps}")
            _clear_stopped(plan.folder)
        return _Ended(plan.saved.folder)
    session = open_session(plan, world, initial, callbacks)
    try:
        return _run(session, monitor_first)
    finally:
        if session.log is not None:
            session.log.close()


def _run(session: Session, monitor_first: bool) -> _Ended:
    """Step, monitor and save until the last step, a signal, or an error, and tell the callbacks which.

    monitor_first: the run was stopped while it measured the step that it resumes from, which is done now.
    """
    plan, progress, monitored, stopped = session.plan, session.plan.start, False, ""
    build, live = partial(ema_model, session), partial(live_model, session)
    timetable = _Timetable(plan.run.checkpoint, session.world)
    try:
        try:
            if progress.step == 0:
                session.monitor.before_training(build)
            elif monitor_first:
                session.monitor.after_step(progress.step, build, live)
            if session.log is not None:
                _clear_stopped(plan.folder)
            monitored = True
            with closing(_steps(session)) as steps:
                for progress in steps:
                    monitored = False
                    session.monitor.after_step(progress.step, build, live)
                    monitored = True
                    if progress.step < plan.run.train.steps and timetable.due(progress.step):
                        watchdog.mark(f"the save of step {progress.step}")
                        log_save(session, session.checkpoints.begin(progress))
                    else:
                        log_save(session, session.checkpoints.take_finished())
        except StopAskedError as stop:
            stopped = str(stop)
        ended = _stop(session, progress, stopped, monitored) if stopped else _finish(session, progress)
    except Exception as error:
        _fail(session, progress, error)
        raise
    _tell_end(session, progress, ended)
    return ended


def _steps(session: Session) -> Generator[Progress, None, None]:
    """Take the optimizer steps that are left; yields how far the run is after each. Communicates."""
    plan, world, run = session.plan, session.world, session.plan.run
    progress, damaged = plan.start, faults.DamagedSamples(plan, world, session.log)
    with closing(_batches(session)) as batches, closing(DrawnAhead(run, plan.batch.global_batch)) as ahead:
        for step in range(plan.start.step, run.train.steps):
            done = step + 1
            watchdog.mark(f"step {done}")
            logged = done in (plan.start.step + 1, run.train.steps) or due(done, run.log.every)
            if logged:  # or what a device has left of the step before would count as waiting for data
                wait_for(world.device)
            began = time.monotonic()
            with raise_on_all_ranks(world, stop_on_signal=True) as data_wait:
                session.callbacks.check()
                loaded = next(batches)
                data_wait.seconds = time.monotonic() - began
                items = draw_trajectories(loaded.batches, plan.data.empty_text, run, world.device, ahead)
            damaged.agree(loaded.damage, done)
            watch = Watch(*progress.watch)
            cutoffs = progress.cutoffs
            result = train_step(session.engine, session.objective, session.ema, items, step, logged, watch, cutoffs)
            tokens = items[0].saliency.shape[1]  # of an image: a step is of one resolution
            if logged:  # the update is part of this step
                wait_for(world.device)
            _log_step(session, done, result, tokens, time.monotonic() - began, data_wait.seconds)
            _check(session, done, result, faults.Suspects(loaded.batches, items))
            progress = Progress(done, *loaded.consumed, result.watch, result.cutoffs)
            yield progress


def _batches(session: Session) -> Generator[Loaded, None, None]:
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


def _check(session: Session, step: int, result: StepResult, suspects: faults.Suspects) -> None:
    """Report a step whose numbers went wrong; end a run that cannot go on. Communicates; TrainingError on all ranks."""
    folder, guard = session.plan.folder, session.plan.run.guard
    if result.verdict.fault:
        faults.report_fault(folder, step, result, suspects, session.world, session.log)
        faults.check_skipped(folder, step, result, guard, is_last=step == session.plan.run.train.steps)
    if result.verdict.applied and guard.replicas_every and step % guard.replicas_every == 0:
        session.engine.check_replicas(step)


def _log_step(session: Session, step: int, result: StepResult, tokens: int, seconds: float, waited: float) -> None:
    if session.log is None:
        return
    run, images = session.plan.run, session.plan.batch.global_batch
    calls = images * rollout_steps(run)
    stats = StepStats(
        step=step,
        losses=result.losses,
        grad_norm=result.grad_norm,
        lr=result.lr,
        lr_scale=run.learning_rate_factors,
        images=images,
        tokens=calls * tokens,
        seconds=seconds,
        wait_seconds=waited,
        effort=_effort(session, tokens, None if result.routing is None else rows_taken(result.routing) / calls),
    )
    more = {} if result.routing is None else routing_scalars(result.routing)
    if run.loss.routing_warmup_steps and has_routing_loss(run):
        more["optim/routing_weight"] = routing_weight(run, step - 1)
    session.log.step(stats, more)
    if session.callbacks:
        _tell_step(session, stats, more)
    if result.routing is not None and session.objective.uses_x0_prev and _is_halfway(run, step):
        warning = strength_warning(result.routing, step)
        if warning:
            session.log.warn(step, warning)


def _tell_step(session: Session, stats: StepStats, more: Mapping[str, float]) -> None:
    told = TrainingStep(
        step=stats.step,
        steps=session.plan.run.train.steps,
        figures=MappingProxyType({**stats.scalars(), **more}),
        lr=stats.lr,
        images=stats.images,
        seconds=stats.seconds,
        is_logged=session.log is not None and session.log.due(stats.step),
    )
    session.callbacks.on_step(told)


def _is_halfway(run: RunConfig, step: int) -> bool:
    """Whether this logged step is the first after the warm-ups and half of the run: once, when there is time to act."""
    half = max(run.train.steps // 2, run.optim.warmup_steps, run.loss.routing_warmup_steps)
    return (step - 1) // run.log.every * run.log.every < half <= step


def _effort(session: Session, tokens: int, rows: float | None) -> Effort:
    """FLOPs of a step on images of `tokens` tokens.

    `rows` that experts computed per image and rollout step; None: as the family's rule expects.
    """
    plan, world = session.plan, session.world
    if rows is None:
        ranks = world.size if plan.run.parallel.pool_scope == "world" else 1
        rows = rows_expected(plan.run, plan.batch.micro_batch * ranks, tokens)
    flops = step_flops(plan.run, tokens, plan.data.train.text_length, rows)
    return Effort(flops, world.size, peak_tflops(plan.run, world.device))


class _Timetable:
    """When a run saves: every so many steps, and when so many minutes have passed on rank 0's clock."""

    def __init__(self, config: CheckpointConfig, world: World) -> None:
        self._config, self._world = config, world
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after optimizer step `step`, the same on every rank.

        Communicates (one number) where checkpoint.minutes is set.
        """
        config = self._config
        due = config.every > 0 and step % config.every == 0
        if config.minutes > 0 and not due:
            passed = self._world.is_main and time.monotonic() - self._last >= 60 * config.minutes
            due = bool(sum_over_ranks(torch.tensor([float(passed)]), self._world).item())
        if due:
            self._last = time.monotonic()
        return due


def _finish(session: Session, progress: Progress) -> _Ended:
    watchdog.mark(f"the save of step {progress.step}")
    folder = ensure_saved(session, progress)
    if session.log is not None:
        if session.plan.run.log.report:
            _write_report(session.plan.folder, session.log)
        session.log.conclude(closing_summary(session.plan.run, session.plan.folder, folder, session.log))
    return _Ended(folder)


def _write_report(folder: Path, log: RunLog) -> None:
    """Write the page of the finished run, without communication. What fails is noted: it ends no run."""
    try:
        write_report([folder])
    except Exception as error:  # noqa: BLE001 - a report that fails must not end a run
        log.say(f"note: the report could not be written: {one_line(error)}; the run is complete")


def _stop(session: Session, progress: Progress, name: str, monitored: bool) -> _Ended:
    """Save the state that a signal found, and leave the file that says so, once the checkpoint is on the disk."""
    watchdog.mark(f"the save of step {progress.step}")
    folder = ensure_saved(session, progress)
    if session.log is not None:
        stopped = _Stopped(name, progress.step, monitored)
        try:
            durable.write_atomically(session.plan.folder / _STOPPED_FILE, json.dumps(stopped._asdict()))
        except OSError as error:  # the checkpoint is there
            session.log.say(f"note: {error.filename}: cannot be written ({error.strerror})")
        session.log.event("stop", progress.step, signal=name, checkpoint=str(folder))
        session.log.say(f"stopped by {name} after step {progress.step}: {folder}; start it again to go on")
    return _Ended(folder, name)


def _tell_end(session: Session, progress: Progress, ended: _Ended) -> None:
    """Call the callbacks a last time, when everything is saved.

    Communicates; raises CallbackError on every rank where one of them has failed since the last step began.
    """
    why: Literal["stopped", "finished"] = "stopped" if ended.signal else "finished"
    end = TrainingEnd(step=progress.step, why=why, message=ended.signal, checkpoint=ended.folder)
    session.callbacks.on_end(end)
    with raise_on_all_ranks(session.world):
        session.callbacks.check()


def _fail(session: Session, progress: Progress, error: Exception) -> None:
    """Tell the log and the callbacks of an error that ends the run; save the state first where a callback raised it.

    Communicates only in that case, in which all ranks have the error.
    """
    folder = None
    if isinstance(error, CallbackError):
        watchdog.mark(f"the save of step {progress.step}")
        folder = ensure_saved(session, progress)
        if session.log is not None:
            session.log.event("callback failed", progress.step, error=str(error), checkpoint=str(folder))
            session.log.say(f"ended by a callback after step {progress.step}: {folder}; start it again to go on")
    elif isinstance(error, SharpMoEError):
        log_save(session, session.checkpoints.wait())
    said = str(error) if isinstance(error, SharpMoEError) else f"{type(error).__name__}: {error}"
    session.callbacks.on_end(TrainingEnd(step=progress.step, why="failed", message=said, checkpoint=folder))


class _Stopped(NamedTuple):
    """Contents of `_STOPPED_FILE`."""

    signal: str
    step: int  # optimizer steps done and saved
    looked: bool  # False: validation and pictures that were due after that step are still to be made


def _monitor_was_cut_off(folder: Path, step: int) -> bool:
    """Whether a run that resumes from `step` was stopped before what was due after it. No communication."""
    try:
        stopped = _Stopped(**json.loads((folder / _STOPPED_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return False
    return stopped.step == step and not stopped.looked


def _clear_stopped(folder: Path) -> None:
    """Remove the file: the run goes on, or is finished."""
    (folder / _STOPPED_FILE).unlink(missing_ok=True)
