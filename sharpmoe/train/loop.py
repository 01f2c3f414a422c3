"""A run from the first line to the last: build, go on from a checkpoint, step, look, save."""

import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path

from data_pipeline.read.schedule import Start
from data_pipeline.read.stream import Loaded, stream
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.errors import SharpMoEError
from sharpmoe.parallel.ranks import watchdog
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks
from sharpmoe.parallel.ranks.signals import StopAskedError
from sharpmoe.train import faults, feed, stopping
from sharpmoe.train.bad_samples import BadSamples
from sharpmoe.train.banner import banner
from sharpmoe.train.flops import ledger, rows_expected
from sharpmoe.train.guard import Watch
from sharpmoe.train.metrics import Effort, StepStats, due, routing_scalars, rows_taken
from sharpmoe.train.monitor import look, look_before
from sharpmoe.train.peak import peak_tflops
from sharpmoe.train.session import Session, ema_model, open_session, save, tell_saved
from sharpmoe.train.setup import Plan, initial_model, settle
from sharpmoe.train.step import StepResult, prepare, train_step
from sharpmoe.train.stopping import Stopped
from sharpmoe.train.timetable import Timetable


def train(plan: Plan, world: World) -> Path:
    """Run a plan to its last step, or to where a signal stops it; returns the last checkpoint's folder.

    Communicates. Raises SharpMoEError on every rank; ends the process with exit code 3 where another rank is lost.
    """
    with watchdog.watching(world.rank, world.size, plan.run.peers):
        return _train(settle(plan, world), world)


def _train(plan: Plan, world: World) -> Path:
    with raise_on_all_ranks(world):
        initial = initial_model(plan)
        owed = stopping.unfinished_look(plan.folder, plan.start.step)
    if world.is_main:
        print(banner(plan.run, initial.model, plan.batch, plan.stage, world), flush=True)
    if plan.saved is not None and plan.start.step >= plan.run.train.steps and not owed:
        if world.is_main:
            print(f"nothing to do: {plan.saved.folder} is at step {plan.start.step} of {plan.run.train.steps}")
            stopping.clear(plan.folder)
        return plan.saved.folder
    session = open_session(plan, world, initial)
    try:
        return _run(session, owed)
    except SharpMoEError:
        tell_saved(session, session.saver.wait())
        raise
    finally:
        if session.log is not None:
            session.log.close()


def _run(session: Session, owed: bool) -> Path:
    """Look, step and save until the last step or a signal. `owed`: what was due at the first place was cut off."""
    plan, progress, looked = session.plan, session.plan.start, False
    build, timetable = partial(ema_model, session), Timetable(plan.run.checkpoint, session.world)
    try:
        _look_first(session, owed)
        looked = True
        with closing(_steps(session)) as steps:
            for progress in steps:
                looked = False
                look(session.looks, build, progress.step)
                looked = True
                if progress.step < plan.run.train.steps and timetable.due(progress.step):
                    watchdog.mark(f"the save of step {progress.step}")
                    tell_saved(session, session.saver.begin(progress))
                else:
                    tell_saved(session, session.saver.ended())
    except StopAskedError as stop:
        return _stop(session, progress, str(stop), looked)
    return _finish(session, progress)


def _look_first(session: Session, owed: bool) -> None:
    plan, build = session.plan, partial(ema_model, session)
    if plan.start.step == 0:
        look_before(session.looks, build)
    elif owed:
        look(session.looks, build, plan.start.step)
    if session.log is not None:
        stopping.clear(plan.folder)


def _steps(session: Session) -> Generator[Progress, None, None]:
    """Take the optimizer steps that are left; yields how far the run is after each. Communicates."""
    plan, world, run = session.plan, session.world, session.plan.run
    progress, bad = plan.start, BadSamples(plan, world, session.log)
    with closing(_batches(session)) as batches:
        for step in range(plan.start.step, run.train.steps):
            began, done = time.monotonic(), step + 1
            watchdog.mark(f"step {done}")
            with raise_on_all_ranks(world, stop_on_signal=True):
                loaded = next(batches)
                came = time.monotonic()
                items = prepare(loaded.batches, plan.data.empty_text, run, world.device)
                preparing = time.monotonic() - came
            waited = time.monotonic() - began - preparing  # until the slowest rank had its samples
            bad.agree(loaded.damage, done)
            with_routing = done in (plan.start.step + 1, run.train.steps) or due(done, run.log.every)
            watch = Watch(*progress.watch)
            result = train_step(session.engine, session.objective, session.ema, items, step, with_routing, watch)
            _log_step(session, done, result, time.monotonic() - began, waited)
            _check(session, done, result, faults.Suspects(loaded.batches, items))
            progress = Progress(done, *loaded.consumed, result.watch)
            yield progress


def _stop(session: Session, progress: Progress, signal: str, looked: bool) -> Path:
    """Save the state that a signal found, and leave word that the run wants to go on."""
    watchdog.mark(f"the save of step {progress.step}")
    folder = save(session, progress)
    if session.log is not None:
        stopping.write(session.plan.folder, Stopped(signal, progress.step, looked))
        session.log.event("stop", progress.step, signal=signal, checkpoint=str(folder))
        session.log.say(f"stopped by {signal} after step {progress.step}: {folder}; start it again to go on")
    return folder


def _finish(session: Session, progress: Progress) -> Path:
    watchdog.mark(f"the save of step {progress.step}")
    folder = save(session, progress)
    if session.log is not None:
        session.log.say(f"done: {folder}")
    return folder


def _check(session: Session, step: int, result: StepResult, suspects: faults.Suspects) -> None:
    """Tell of a step whose numbers went wrong, and end a run that cannot go on. Communicates; TrainingError on all."""
    folder, guard = session.plan.folder, session.plan.run.guard
    if result.verdict.fault:
        faults.tell(folder, step, result, suspects, session.world, session.log)
        faults.check_going_on(folder, step, result, guard)
    if result.verdict.applied and guard.replicas_every and step % guard.replicas_every == 0:
        session.engine.check_replicas(step)


def _batches(session: Session) -> Generator[Loaded, None, None]:
    plan, world = session.plan, session.world
    batches = stream(
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
    return feed.watched(batches)


def _log_step(session: Session, step: int, result: StepResult, seconds: float, waited: float) -> None:
    if session.log is None:
        return
    run, images = session.plan.run, session.plan.batch.global_batch
    calls = images * (1 if run.stage == "pretrain" else run.rollout.num_steps)
    stats = StepStats(
        step=step,
        losses=result.losses,
        grad_norm=result.grad_norm,
        lr=result.lr,
        images=images,
        tokens=calls * run.model.num_tokens,
        seconds=seconds,
        wait_seconds=waited,
        effort=_effort(session, None if result.routing is None else rows_taken(result.routing) / calls),
    )
    session.log.step(stats, None if result.routing is None else routing_scalars(result.routing))


def _effort(session: Session, rows: float | None) -> Effort:
    """What a step computed: by the routing taken (rows per image and rollout step), where it was looked at."""
    plan, world = session.plan, session.world
    if rows is None:
        ranks = world.size if plan.run.parallel.pool_scope == "world" else 1
        rows = rows_expected(plan.run, plan.batch.micro_batch * ranks)
    spent = ledger(plan.run, plan.data.train.text_length, rows)
    return Effort(spent, world.size, peak_tflops(plan.run, world.device))
