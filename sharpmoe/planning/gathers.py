"""How often ZeRO-3 gathers each parameter in an optimizer step.

A parameter is gathered when a module needs it, or ahead of that by the order recorded in the call before, and stays as
long as the same order says that it is needed again within `max_reuse` elements. An optimizer step is one engine call
in which forwards and backwards take turns, in the same order at every step. `coordinator` imitates these decisions for
one version of DeepSpeed; under any other, gathers are bounded from above.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.planning.coordinator import MODEL, ROOT, Coordinator, Reached, Used, version_notes
from sharpmoe.planning.layout import RankLayout, RankParameter
from sharpmoe.train.rollout_schedules import Pass, RolloutSchedule
from sharpmoe.train.terms import fields_with_gradient

_Blocks = Sequence[int | None]  # of each module in the order of use, which block it is; None before and after these
_FOLLOWED = 4  # most micro-batches that are followed one by one
_WARM_UP = 2  # optimizer steps until the recorded orders repeat


class Gathers(NamedTuple):
    """What one optimizer step gathers."""

    times: tuple[int, ...]  # per parameter
    peak: int  # most elements that are gathered at one time
    arriving: int  # most elements of one gather beside a full graph: they come in one piece and are then copied out


def count_gathers(
    run: RunConfig, parts: Sequence[RankParameter], schedule: RolloutSchedule, layout: RankLayout
) -> Gathers:
    """Follow some optimizer steps module by module and count the last one; middle micro-batches are alike.

    An upper bound where the installed DeepSpeed is not the one that is imitated.
    """
    if version_notes():
        return _upper_bound(run, parts, schedule, layout)
    if layout.accumulation <= _FOLLOWED:
        return _count(run, parts, schedule, layout)
    fewer, more = (_count(run, parts, schedule, layout._replace(accumulation=_FOLLOWED - n)) for n in (1, 0))
    others = layout.accumulation - _FOLLOWED
    return more._replace(times=tuple(b + others * (b - a) for a, b in zip(fewer.times, more.times, strict=True)))


def _upper_bound(
    run: RunConfig, parts: Sequence[RankParameter], schedule: RolloutSchedule, layout: RankLayout
) -> Gathers:
    """Bound the gathers: a module is gathered at each of its uses, and once more ahead of a use that never comes.

    At the peak all parameters are gathered, and every model call of the largest graph holds a copy of the experts.
    """
    uses, blocks = Counter[int](), _blocks(parts)
    for each in schedule.passes:
        forward = _forward_order(run, each, blocks)
        uses.update(used.module for used in forward)
        uses.update(reached.module for reached in _backward_order(run, each, forward, blocks))
    times = tuple(
        1 if part.numel <= layout.zero.persistence else 1 + layout.accumulation * uses[part.module] for part in parts
    )
    copied = [part for part in parts if part.ranks > 1]  # one rank's part is the whole elsewhere: no copy
    whole, experts = (sum(part.numel for part in some) for some in (copied, [p for p in copied if p.is_expert]))
    calls = max(each.graph_calls for each in schedule.passes)
    modules = Counter[int]()
    for part in copied:
        modules[part.module] += part.numel
    ahead = layout.zero.prefetch_bucket + max((part.numel for part in copied), default=0)
    arriving = min(whole, max([ahead, *modules.values()]))
    return Gathers(times=times, peak=whole + calls * experts, arriving=arriving)


def _count(run: RunConfig, parts: Sequence[RankParameter], schedule: RolloutSchedule, layout: RankLayout) -> Gathers:
    coordinator, blocks = Coordinator(parts, layout.zero), _blocks(parts)
    before = [0] * len(parts)
    for _ in range(_WARM_UP + 1):
        before, coordinator.peak, coordinator.arriving = list(coordinator.times), 0, 0
        _engine_call(coordinator, run, schedule.passes * layout.accumulation, blocks)
        coordinator.optimizer_step()
    times = tuple(now - then for now, then in zip(coordinator.times, before, strict=True))
    return Gathers(times=times, peak=coordinator.peak, arriving=coordinator.arriving)


def _engine_call(coordinator: Coordinator, run: RunConfig, passes: Sequence[Pass], blocks: _Blocks) -> None:
    """The call and the one backward that is the engine's."""
    coordinator.start()
    root = Used(-1, ROOT, has_graph=False, is_late=False)
    coordinator.forward([root])
    for number, part in enumerate(passes):
        forward = _forward_order(run, part, blocks)
        coordinator.forward(forward)
        last = [Reached(-1, ROOT, False)] if number == len(passes) - 1 else []
        coordinator.backward([*last, *_backward_order(run, part, forward, blocks)])
    coordinator.finish()


def _blocks(parts: Sequence[RankParameter]) -> _Blocks:
    """Return which block each module is."""
    return list(dict(sorted((part.module, part.block) for part in parts)).values())


def _forward_order(run: RunConfig, part: Pass, blocks: _Blocks) -> list[Used]:
    """Modules in the order in which forwards call them: the first embeds the latent, and the x0_prev."""
    step = [MODEL, *([0] * _uses_x0_prev(run)), *range(len(blocks))]
    quiet = part.no_graph_calls or int(len(part.calls) > 1)  # model calls at the beginning that meet no full graph
    return [
        Used(call * len(step) + place, module, call >= part.no_graph_calls and not part.recompute, call >= quiet)
        for call in range(len(part.calls))
        for place, module in enumerate(step)
    ]


def _backward_order(run: RunConfig, part: Pass, forward: Sequence[Used], blocks: _Blocks) -> list[Reached]:
    """Modules as a backward reaches them: what holds others comes before them.

    A module is reached once for each of its outputs that has a gradient, and once more to be recomputed. It is released
    when all its inputs have their gradients, which DeepSpeed sees only for the last forward of the module.
    """
    starts = [used.place for used in forward if used.module == MODEL][part.no_graph_calls :]
    reached = []
    for first, end in reversed(list(zip(starts, [*starts[1:], len(forward)], strict=True))):
        reached.append(Reached(first, MODEL, False))
        for place in reversed(range(first + 1, end)):
            module = forward[place].module
            times = _times_reached(run, module, part.recompute, blocks)
            released = (end == len(forward) or part.recompute) and _has_all_gradients(run, module, blocks)
            reached += [Reached(place, module, False)] * (times - 1)
            reached.append(Reached(place, module, released))
    return reached


def _has_all_gradients(run: RunConfig, module: int, blocks: _Blocks) -> bool:
    """Whether every input of a module that could have a gradient gets one: embedders have none, and a dense block is
    handed the x0_prev without using it.
    """
    block = blocks[module]
    if block is None:
        return module > blocks.index(0)
    return run.model.is_moe(block) or not _uses_x0_prev(run)


def _uses_x0_prev(run: RunConfig) -> bool:
    return run.stage == "posttrain" and run.model.saliency_router


def _times_reached(run: RunConfig, module: int, recompute: bool, blocks: _Blocks) -> int:
    block = blocks[module]
    if block is None:  # the embedder of the condition is the last before the blocks: tokens and pooled text
        return 2 if module == blocks.index(0) - 1 and run.model.conditioning == "text" else 1
    outputs = 1 + (len(fields_with_gradient(run)) if run.model.is_moe(block) else 0)
    return outputs + int(recompute)
