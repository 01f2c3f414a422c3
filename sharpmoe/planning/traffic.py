"""Bytes that one rank sends per optimizer step. Pure.

A gather of a tensor of S bytes from g ranks costs each rank (g - 1) / g of S, a reduce-scatter the same, an all-reduce
twice that: what rings and direct exchanges both send.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.families import rows_of_call
from sharpmoe.planning.gathers import Gathers
from sharpmoe.planning.layout import RankLayout, RankParameter, trained_parts
from sharpmoe.planning.memory import groups_of
from sharpmoe.train.rollout_schedules import RolloutSchedule


class Traffic(NamedTuple):
    """Bytes sent by one rank per optimizer step."""

    gathers: int  # weights
    reductions: int  # gradients
    exchanges: int  # tokens on their way to experts and back: all-to-all
    pool: int  # scores of a pool over all ranks (parallel.pool_scope: world)
    passes: float  # how many times a rank gathers the model
    fetches: int  # gathers of a block, an embedder or the final layer as a whole (ZeRO-3)

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return self.gathers + self.reductions + self.exchanges + self.pool


def traffic(
    run: RunConfig,
    layout: RankLayout,
    parts: Sequence[RankParameter],
    schedule: RolloutSchedule,
    gathers: Gathers,
    tokens: int,
) -> Traffic:
    """Add up the bytes of weights, gradients and tokens of one optimizer step on images of `tokens` tokens."""
    calls = _model_calls(schedule, layout.accumulation)
    return Traffic(
        gathers=_gathers(parts, layout, gathers),
        reductions=_reductions(parts, layout),
        exchanges=_exchanges(run, layout, calls, tokens),
        pool=_pool(run, layout, calls, tokens),
        passes=_passes(parts, gathers) if layout.zero.stage == 3 else 1.0,
        fetches=_fetches(parts, gathers) if layout.zero.stage == 3 else 0,
    )


def _sent(numel: int, ranks: int) -> int:
    """Elements that a rank sends when a tensor is gathered or reduce-scattered over `ranks`."""
    return numel * (ranks - 1) // ranks


def _gathers(parts: Sequence[RankParameter], layout: RankLayout, gathers: Gathers) -> int:
    if layout.zero.stage == 3:
        moved = sum(_sent(part.padded, part.ranks) * n for part, n in zip(parts, gathers.times, strict=True))
    else:
        moved = sum(_sent(numel, ranks) for (_, ranks), numel in groups_of(trained_parts(parts)).items())
    return moved * layout.zero.compute_bytes


def _reductions(parts: Sequence[RankParameter], layout: RankLayout) -> int:
    """Gradients are reduced in the one backward of the engine, whatever the schedule."""
    zero = layout.zero
    trained = trained_parts(parts)
    moved = sum(_sent(part.padded if zero.stage == 3 else part.numel, part.ranks) for part in trained)
    scattered = zero.reduce_scatter if zero.stage == 3 else zero.reduce_scatter and not zero.whole_buckets
    return moved * (1 if scattered else 2) * zero.wire_bytes


def _passes(parts: Sequence[RankParameter], gathers: Gathers) -> float:
    total = sum(part.numel for part in parts)
    return sum(part.numel * n for part, n in zip(parts, gathers.times, strict=True)) / total


def _fetches(parts: Sequence[RankParameter], gathers: Gathers) -> int:
    """Add up how often each module is gathered: as often as those of its parameters that do not stay whole."""
    times = Counter[int]()
    for part, number in zip(parts, gathers.times, strict=True):
        times[part.module] = max(times[part.module], number)
    return times.total()


class _Calls(NamedTuple):
    """Rollout steps that the model computes per optimizer step."""

    forwards: int  # recomputed and repeated ones included
    backwards: int
    choosing: int  # forwards that choose experts


def _model_calls(schedule: RolloutSchedule, accumulation: int) -> _Calls:
    forwards = schedule.forwards + schedule.recomputed
    choosing = forwards - schedule.run_twice  # a second run is given the routing of the first
    return _Calls(forwards * accumulation, schedule.num_trained * accumulation, choosing * accumulation)


def _exchanges(run: RunConfig, layout: RankLayout, calls: _Calls, tokens: int) -> int:
    """Two exchanges of the rows per layer and forward, two more per backward; balanced routing."""
    rows = [rows_of_call(layer, layout.micro_batch, tokens) for layer in run.model.moe_blocks]
    sent = sum(_sent(each * run.model.width * layout.zero.compute_bytes, layout.ep_size) for each in rows)
    return 2 * sent * (calls.forwards + calls.backwards)


def _pool(run: RunConfig, layout: RankLayout, calls: _Calls, tokens: int) -> int:
    if run.parallel.pool_scope != "world" or not run.model.family.pools_calls:
        return 0
    scores = layout.micro_batch * tokens * run.model.num_experts * 4
    return scores * (layout.world - 1) * run.model.num_moe_layers * calls.choosing
