"""How often ZeRO-3 gathers each parameter in an optimizer step.

A parameter is gathered when a module needs it, or ahead of that by the order recorded in the call before, and stays as
long as the same order says that it is needed again within `max_reuse` elements. An engine call whose order differs from
the one before loses the record, and everything is then gathered anew for every module.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sharpmoe.budget.coordinator import MODEL, ROOT, Coordinator, Reached
from sharpmoe.budget.layout import Layout, Part
from sharpmoe.budget.schedules import EngineCall, Schedule
from sharpmoe.config import RunConfig
from sharpmoe.train.objective import has_router_loss, has_routing_loss

_BEFORE, _AFTER = 3, 1  # modules beside the blocks: embedders, of which the condition is last, and the final layer
_WARM_UP = 2  # optimizer steps until the recorded orders repeat


class Gathers(NamedTuple):
    """What one optimizer step gathers."""

    times: tuple[int, ...]  # per parameter
    peak: int  # most elements that are gathered at one time
    arriving: int  # most elements of one gather beside a full graph: they come in one piece and are then copied out


def count_gathers(run: RunConfig, parts: Sequence[Part], schedule: Schedule, layout: Layout) -> Gathers:
    """Follow some optimizer steps call by call and count the last one."""
    coordinator = Coordinator(parts, layout.zero)
    before = [0] * len(parts)
    for _ in range(_WARM_UP + 1):
        before, coordinator.peak, coordinator.arriving = list(coordinator.times), 0, 0
        for _ in range(layout.accumulation):
            for call in schedule.calls:
                coordinator.call(forward_order(run, call), backward_order(run, call), call)
        coordinator.optimizer_step()
    times = tuple(now - then for now, then in zip(coordinator.times, before, strict=True))
    return Gathers(times, coordinator.peak, coordinator.arriving)


def forward_order(run: RunConfig, call: EngineCall) -> list[int]:
    """Modules in the order in which a forward calls them: the first embeds the latent, and the guidance."""
    return [ROOT, *([MODEL, *([0] * _is_guided(run)), *range(_BEFORE + run.model.depth + _AFTER)] * call.steps)]


def backward_order(run: RunConfig, call: EngineCall) -> list[Reached]:
    """Modules as a backward reaches them: what holds others comes before them.

    A module is reached once for each of its outputs that has a gradient, and once more to be recomputed. It is released
    when all its inputs have their gradients, which DeepSpeed sees only for the last forward of the module.
    """
    if not call.backward:
        return []
    order = forward_order(run, call)
    starts = [place for place, module in enumerate(order) if module == MODEL]
    reached = [Reached(0, ROOT, False)]
    for first, end in reversed(list(zip(starts, [*starts[1:], len(order)], strict=True))):
        reached.append(Reached(first, MODEL, False))
        for place in reversed(range(first + 1, end)):
            times = _times_reached(run, order[place], call.recompute)
            released = (end == len(order) or call.recompute) and _has_all_gradients(run, order[place])
            reached += [Reached(place, order[place], False)] * (times - 1)
            reached.append(Reached(place, order[place], released))
    return reached


def _has_all_gradients(run: RunConfig, module: int) -> bool:
    """Whether every input of a module that could have a gradient gets one: embedders have none, and a dense block is
    handed the guidance without using it.
    """
    block = module - _BEFORE
    return block >= run.model.depth or (block >= 0 and (run.model.is_moe(block) or not _is_guided(run)))


def _is_guided(run: RunConfig) -> bool:
    return run.stage == "posttrain" and run.model.saliency_router


def _times_reached(run: RunConfig, module: int, recompute: bool) -> int:
    block = module - _BEFORE
    if not 0 <= block < run.model.depth:
        return 2 if module == _BEFORE - 1 and run.model.conditioning == "text" else 1  # tokens and pooled text
    outputs = 1 + (len(_routing_with_gradient(run)) if run.model.is_moe(block) else 0)
    return outputs + int(recompute)


def _routing_with_gradient(run: RunConfig) -> set[str]:
    """Fields of `Routing` that the losses read."""
    fields = {"diffmoe": {"capacity_logits"}, "race": {"logits", "prediction"}}.get(run.model.router, set())
    if has_routing_loss(run):
        fields = fields | {"scores" if run.loss.routing_mass == "counts" else "gates"}
    if has_router_loss(run) and run.model.router != "race":
        fields = fields | {"similarity" if run.model.gate == "prototypes" else "scores"}
    return fields
