"""Warnings on a layout, and other layouts that fit where it does not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.parallel.experts.groups import possible_ep_sizes
from sharpmoe.planning.activations import FULLEST_LAYER, FULLEST_STEP
from sharpmoe.planning.coordinator import version_notes
from sharpmoe.planning.estimate import Budget, Estimate, Planner
from sharpmoe.planning.layout import rank_parameters
from sharpmoe.planning.memory import Memory
from sharpmoe.train.tally import pools_trajectories

_GIB = 2**30
RESERVE = 0.1  # of the device: context, libraries, workspaces, fragments of the allocator
_MOST_FITS = 4
_OFTEN = 1.5  # gathers of the model in a step from which they are reported
_ONCE = 1.05  # the model, and hardly anything twice
_REUSE_DISTANCES = (1, 2, 4)  # in models: how far ahead DeepSpeed has to look depends on what it gathers ahead
_LARGE_BUCKET = 0.25  # share of the peak from which an idle bucket is reported


class Advice(NamedTuple):
    """What a user should know before starting a run."""

    warnings: tuple[str, ...]
    fits: tuple[Estimate, ...]  # where the run does not fit: layouts that do, the least traffic first
    notes: tuple[str, ...] = ()  # what is assumed, and what could be faster


def usable(device_memory: float) -> float:
    """Return the bytes that a run may use of a device of so many GiB."""
    return device_memory * _GIB * (1 - RESERVE)


def advise(planner: Planner, budget: Budget, device_memory: float) -> Advice:
    """Return warnings on the run as configured, and the layouts that fit where it does not."""
    own = budget.own
    warnings = [
        *_memory_warnings(own, device_memory),
        *gather_notes(planner, own, device_memory),
        *_bucket_warnings(own, budget),
    ]
    warnings += version_notes() if own.layout.zero.stage == 3 else ()
    if own.memory.peak <= usable(device_memory):
        return Advice(tuple(warnings), (), (*pool_notes(planner.run), *stage_notes(planner, own, device_memory)))
    fitting = [other for other in _neighbours(planner, budget) if other.memory.peak <= usable(device_memory)]
    best = tuple(sorted(fitting, key=lambda other: other.traffic.total)[:_MOST_FITS])
    return Advice(tuple(warnings), best, pool_notes(planner.run))


def pool_notes(run: RunConfig) -> tuple[str, ...]:
    """Say where the rows that experts take vary from step to step, and what is planned for them."""
    if not pools_trajectories(run):
        return ()
    most = run.model.num_experts / max(block.capacity for block in run.model.moe_blocks)
    return (
        f"rollout.pool is trajectory: how many tokens experts take varies over the steps; planned for {FULLEST_STEP:g} "
        f"times their mean in a step and {FULLEST_LAYER:g} times in one recomputed block, as measured; the bound is "
        f"{most:g} times",
    )


def stage_notes(planner: Planner, own: Estimate, device_memory: float) -> tuple[str, ...]:
    """Say where a run under ZeRO-3 also fits under ZeRO-2, which neither gathers nor runs hooks around its modules."""
    layout, zero = own.layout, own.layout.zero
    if zero.stage != 3 or zero.host_weights:
        return ()
    other = planner.estimate(layout._replace(zero=replace(zero, stage=2, double_buffer=False)), own.schedule)
    room = usable(device_memory)
    if other.memory.peak > room:
        return ()
    calls = own.schedule.model_uses * layout.accumulation
    sends = [f"{each.traffic.total / _GIB:.2f} GiB" for each in (other, own)]
    sent = f"; a rank sends {sends[0]} instead of {sends[1]}" if layout.world > 1 else ""
    return (
        f"ZeRO-2 fits too, {other.memory.peak / _GIB:.2f} GiB of {room / _GIB:.1f} usable: a step saves "
        f"{own.traffic.fetches} gathers of blocks and embedders, and ZeRO-3's hooks around them in {calls} forwards "
        f"and backwards{sent} (--deepspeed configs/zero2.json)",
    )


def gather_notes(planner: Planner, own: Estimate, device_memory: float) -> tuple[str, ...]:
    """Say where ZeRO-3 gathers weights again within an optimizer step, and what it costs to keep them gathered."""
    zero = own.layout.zero
    if zero.stage != 3 or own.traffic.passes <= _OFTEN:
        return ()
    lowest, room = min(zero.max_reuse, zero.max_live), usable(device_memory)
    whole = sum(part.numel for part in rank_parameters(planner.run, own.layout.world, own.layout.ep_size))
    for enough in (times * whole for times in _REUSE_DISTANCES):
        limits = replace(zero, max_reuse=enough, max_live=enough)
        kept = planner.estimate(own.layout._replace(zero=limits), own.schedule)
        if kept.traffic.passes < _ONCE:
            break
    sends, peaks = (
        f"{after / _GIB:.2f} instead of {before / _GIB:.2f} GiB"
        for before, after in ((own.traffic.total, kept.traffic.total), (own.memory.peak, kept.memory.peak))
    )
    sent = f", and a rank sends {sends}" if own.layout.world > 1 else ""
    return (
        f"the model is gathered {own.traffic.passes:.1f} times per step instead of once: stage3_max_reuse_distance and "
        f"stage3_max_live_parameters allow {lowest} elements; with both at {enough} it is gathered "
        f"{kept.traffic.passes:.1f} times{sent}, for {peaks} at the peak, which "
        f"{'fits' if kept.memory.peak <= room else 'does not fit'}",
    )


def _memory_warnings(own: Estimate, device_memory: float) -> Iterator[str]:
    room = usable(device_memory)
    if own.memory.peak > room:
        yield (
            f"does not fit: {own.memory.peak / _GIB:.1f} GiB at the peak, {room / _GIB:.1f} of {device_memory:g} GiB "
            f"usable; most of it is {_largest(own.memory)}"
        )


def _largest(memory: Memory) -> str:
    """The largest item of the peak, in words."""
    items = {
        "activations": memory.activations,
        "weights, masters and optimizer": memory.state,
        "gathered weights": memory.gathered + memory.arriving,
        "whole gradients, added up or waiting": memory.sums + memory.whole_gradients,
        "the whole model of the monitor (log.*)": memory.look,
    }
    return max(items, key=lambda name: items[name])


def _bucket_warnings(own: Estimate, budget: Budget) -> Iterator[str]:
    idle = own.layout.zero.reduce_bucket - budget.parameters
    if own.layout.zero.contiguous and idle * own.layout.zero.wire_bytes > _LARGE_BUCKET * own.memory.peak:
        yield (
            f"reduce_bucket_size is {own.layout.zero.reduce_bucket}, the model has {budget.parameters} parameters: "
            "most of the bucket is never used"
        )


def _neighbours(planner: Planner, budget: Budget) -> Iterator[Estimate]:
    """The same ranks and batch under every schedule, number of ranks per expert group, and both stages."""
    layout = budget.own.layout
    for ep_size in possible_ep_sizes(planner.run, layout.world):
        for stage in (2, 3):
            other = layout._replace(ep_size=ep_size, zero=replace(layout.zero, stage=stage))
            yield from (planner.estimate(other, estimate.schedule) for estimate in budget.estimates)
