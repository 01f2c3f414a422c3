"""`train.py --dry-run`: check all that a start of a run checks before its first step, and change nothing.

The checks are those of the start itself, in its order, so that what is refused here is refused there with the same
line; tests/planning/test_rehearsal.py holds the list. In addition: room on the disk for all checkpoints, where a start
asks for that of one, and the memory plan against the device. No communication.
"""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch

from data_pipeline.read.schedule import Start
from data_pipeline.read.stream import stream
from data_pipeline.safety import scheme_of
from sharpmoe.checkpoint.save import Checkpoints
from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.held_out import Share
from sharpmoe.invocation import spell_command
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.settings import regather_warnings, zero_title
from sharpmoe.planning.advice import gather_notes, pool_notes, stage_notes, usable
from sharpmoe.planning.auto import resolve_schedule
from sharpmoe.planning.disk import CheckpointSpace
from sharpmoe.planning.estimate import Estimate, Planner
from sharpmoe.planning.layout import rank_parameters
from sharpmoe.planning.table import memory_lines
from sharpmoe.train.monitor import Monitor
from sharpmoe.train.owner import check_unowned
from sharpmoe.train.provenance import banner
from sharpmoe.train.rollout_schedules import schedule_of
from sharpmoe.train.setup import RunPlan, initial_model, make_plan, rehearse_checkpoint
from sharpmoe.train.shapes import token_counts
from sharpmoe.train.target import with_target_scales
from sharpmoe.train.trajectories import draw_trajectories

ASSUMED_MEMORY = 80.0  # GiB of a device of which nothing is known, as in launcher/plan.py
_GIB = 2**30


class Target(NamedTuple):
    """The machines that the run is going to have."""

    ranks: int
    device_memory: float | None  # GiB; None: not known
    is_here: bool  # whether the devices are of the kind that this process sees

    @classmethod
    def of(cls, world: World, memory: float, ranks: int | None = None, device_memory: float | None = None) -> "Target":
        """Return these ranks and their `memory`, or others: a process without a GPU knows nothing of their devices."""
        is_here = ranks is None or world.device.type != "cpu"
        return cls(ranks or world.size, device_memory or (memory if is_here else None), is_here)


def rehearse(requested: RunConfig, ds_config: dict[str, Any], world: World, target: Target) -> str:
    """Check a run on the target as its start would; return the banner, the memory plan, what it begins with, and `ok`.

    Reads the data of the first step, the initial weights or the checkpoint, and held-out samples that are measured.
    Writes nothing but, for remote shards, a temporary folder. Raises what the start raises: SharpMoEError.
    """
    planned = world if target.ranks == world.size else world._replace(rank=0, size=target.ranks)
    with _cache_elsewhere(requested) as cached:
        run, found = resolve_schedule(cached, ds_config, planned.size, target.device_memory or ASSUMED_MEMORY)
        plan = make_plan(run, ds_config, planned, found, readers=world)
        check_unowned(plan.folder)
        plan = with_target_scales(rehearse_checkpoint(plan), world._replace(rank=0, size=1))
        initial = initial_model(plan)
        initial.weights.check_finite(world.rank, world.size)
        notes = [*plan.notes, *initial.notes]
        if not plan.is_finished:
            notes += _check_start(plan, planned, target)
    planner = Planner(plan.run, token_counts(plan.data.train.buckets)[-1])
    estimate = planner.estimate(planner.layout(planned.size, plan.ds_config), schedule_of(plan.run))
    notes += pool_notes(plan.run)
    if target.device_memory is not None:
        notes += gather_notes(planner, estimate, target.device_memory)
        notes += stage_notes(planner, estimate, target.device_memory)
    lines = [
        *memory_lines(run, estimate, target.device_memory),
        _disk_line(plan),
        f"  {'starts':<11}{_beginning(plan)}",
        *(f"  note: {note}" for note in notes),
    ]
    _check_memory(estimate, target)
    tokens = token_counts(plan.data.train.buckets)
    return "\n".join(
        [banner(plan.run, initial.model, plan.batch, zero_title(plan.ds_config), planned, tokens), *lines, "ok"]
    )


@contextmanager
def _cache_elsewhere(run: RunConfig) -> Iterator[RunConfig]:
    """Within the context remote shards are read through a temporary cache."""
    if all(scheme_of(place) is None for place, _ in run.data.places):
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        remote = run.data.remote.model_copy(update={"cache": folder})
        yield run.model_copy(update={"data": run.data.model_copy(update={"remote": remote})})


def _check_start(plan: RunPlan, planned: World, target: Target) -> list[str]:
    """Check what a start does after its banner: engine, monitor, first batch. Returns notes."""
    run, notes = plan.run, []
    if target.is_here:
        Engine.check(run, plan.ds_config, planned.device)
    else:
        notes.append(
            "checked on a machine without a GPU: packages that need one (optim.impl) are not checked"
            + ("" if target.device_memory else ", nor the memory of the devices; give it with --device-memory GIB")
        )
    monitor = Monitor.open(run, plan.data.held_out, plan.folder, torch.device("cpu"), Share(), None)
    if monitor.judges:
        notes.append(f"judges {monitor.judges} every {run.log.metrics_every} steps")
    batches = stream(
        plan.data.train,
        seed=run.seed,
        global_batch=plan.batch.global_batch,
        micro_batch=plan.batch.micro_batch,
        rank=planned.rank,
        world=planned.size,
        start=Start(plan.start.samples, plan.start.streams),
        max_bad_fraction=run.data.max_bad_fraction,
    )
    with closing(batches):
        draw_trajectories(next(batches).batches, plan.data.empty_text, run, torch.device("cpu"))
    uses = schedule_of(run).model_uses * plan.batch.accumulation
    held = sum(part.numel for part in rank_parameters(run, planned.size, run.parallel.ep_size))
    return [*notes, *regather_warnings(plan.ds_config, held, uses)]


def _check_memory(estimate: Estimate, target: Target) -> None:
    """Raise ConfigError where the run as planned cannot fit the whole device; between that and usable it may."""
    peak, memory = estimate.memory.peak, target.device_memory
    if memory is not None and peak > memory * _GIB:
        raise ConfigError(
            f"memory: {estimate.title} takes {peak / _GIB:.1f} GiB per rank at the peak as planned, a device has "
            f"{memory:.1f} ({usable(memory) / _GIB:.1f} usable); set rollout.schedule to auto, lower "
            "train.micro_batch, or raise parallel.ep_size or the number of ranks "
            f"(`{spell_command('plan')}` lists what fits)"
        )


def _disk_line(plan: RunPlan) -> str:
    """Return what the checkpoints take; raise CheckpointError where the disk has no room for those still to come."""
    space = CheckpointSpace.of(plan)
    Checkpoints.check_room(plan.checkpoints, space.more, space.size)
    return f"  {'disk':<11}{space.line()}"


def _beginning(plan: RunPlan) -> str:
    """Say what the run would do first."""
    run, steps = plan.run, plan.run.train.steps
    if plan.is_finished:
        return f"nothing to train: {plan.saved and plan.saved.folder} is at step {plan.start.step} of {steps}"
    if plan.saved is not None:
        return f"resumes step {plan.start.step} of {steps} from {plan.saved.folder}"
    if run.checkpoint.init is not None:
        return f"a new run of {steps} steps from the weights {run.checkpoint.init}"
    return f"a new run of {steps} steps from drawn weights (seed {run.seed})"
