"""The moving parts of one run, and what is done with all of them at once: opened, averaged, saved."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sharpmoe.checkpoint import load
from sharpmoe.checkpoint.manifest import Progress
from sharpmoe.checkpoint.save import Facts, Outcome, Saver
from sharpmoe.checkpoint.snapshot import Contents
from sharpmoe.config_io import dump_run_config
from sharpmoe.evaluation.held_out import Share
from sharpmoe.model.dit import DiT
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks, sum_over_ranks
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train import provenance
from sharpmoe.train.monitor import Looks, make_looks
from sharpmoe.train.objective import Objective
from sharpmoe.train.runlog import RunLog
from sharpmoe.train.setup import Initial, Plan


class Session(NamedTuple):
    """The moving parts of a run."""

    plan: Plan
    world: World
    objective: Objective
    engine: Engine
    ema: ShardEma
    looks: Looks
    saver: Saver

    @property
    def log(self) -> RunLog | None:
        """The run's log, on rank 0."""
        return self.looks.log


def open_session(plan: Plan, world: World, initial: Initial) -> Session:
    """Partition the model, load the checkpoint, open the log. Communicates; raises SharpMoEError on every rank."""
    objective = Objective(initial.model, plan.run)
    engine = Engine(objective, plan.run, plan.ds_config, world, objective.values(initial.weights))
    ema = ShardEma(engine, plan.run.optim.ema_decay)
    contents = Contents(engine, ema, objective.model, plan.data.origin())
    if plan.saved is not None:
        load.load(plan.saved, contents)
    settings = provenance.settings(plan.run, plan.ds_config, world) if world.is_main else {}
    saver = Saver(plan.checkpoints, Facts(plan.layout, settings), contents, plan.run.checkpoint)
    share = Share(world.rank, world.size, lambda table: sum_over_ranks(table, world))
    with raise_on_all_ranks(world):
        log = _open_log(plan, [*plan.notes, *initial.notes, *engine.notes], settings) if world.is_main else None
        looks = make_looks(plan.run, plan.data.held_out, plan.folder, world.device, share, log)
    return Session(plan, world, objective, engine, ema, looks, saver)


def _open_log(plan: Plan, notes: Sequence[str], settings: provenance.Settings) -> RunLog:
    log = RunLog(plan.folder, plan.run.train.steps, plan.start.step + 1, plan.run.log.every, settings=settings)
    (plan.folder / "config.yaml").write_text(dump_run_config(plan.run), encoding="utf-8")
    (plan.folder / "zero.json").write_text(json.dumps(plan.ds_config, indent=2), encoding="utf-8")
    if plan.saved is not None:
        changed = provenance.changes(plan.saved.settings, settings)
        log.event("resume", plan.start.step, checkpoint=str(plan.saved.folder), changed=changed)
        log.say(f"going on from {plan.saved.folder}; {provenance.in_words(changed)}")
    for note in notes:
        log.say(f"note: {note}")
    return log


def ema_model(session: Session) -> DiT:
    """Build a plain model with the averaged weights on every rank, in eval mode: looks need no engine. Communicates.

    It takes 4 bytes per parameter for as long as it lives. Running the partitioned module outside of the engine's
    forward would make DeepSpeed record a parameter order without end, and every call slower than the one before.
    A signal that asks the run to stop raises StopAskedError from its next call, on every rank.
    """
    state = session.ema.full_weights(session.objective.model, everywhere=True)
    with torch.device("meta"):
        twin = DiT(session.plan.run.model)
    twin.load_state_dict(state, assign=True)
    twin.register_forward_pre_hook(partial(_heed_signals, session.world))
    return twin.eval()


def _heed_signals(world: World, *_: object) -> None:
    with raise_on_all_ranks(world, stop_on_signal=True):
        pass


def save(session: Session, progress: Progress) -> Path:
    """Make sure that a state is on the disk, as the newest checkpoint. Communicates; CheckpointError on every rank."""
    plan, outcome = session.plan, session.saver.wait()
    tell_saved(session, outcome)
    if outcome is not None and outcome.error is None and outcome.progress.step == progress.step:
        return outcome.folder
    if plan.saved is not None and plan.run.checkpoint.resume == "auto" and plan.start.step == progress.step:
        return plan.saved.folder
    return session.saver.save(progress)


def tell_saved(session: Session, outcome: Outcome | None) -> None:
    """Put a save that ended on record; one that failed costs the run nothing but that checkpoint."""
    if outcome is None or session.log is None:
        return
    step, error = outcome.progress.step, outcome.error
    seconds = {"stalled": round(outcome.stalled, 3), "seconds": round(outcome.seconds, 3)}
    if error is None:
        session.log.event("save", step, checkpoint=str(outcome.folder), **seconds)
    else:
        session.log.event("save failed", step, error=str(error), **seconds)
        session.log.say(f"warning: step {step} was not saved, training goes on: {error}")
