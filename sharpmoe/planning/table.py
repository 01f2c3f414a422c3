"""The plan as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sharpmoe.config import RunConfig
from sharpmoe.model.matrices import optimizer_title
from sharpmoe.model.trainable import planned_model, trained_title, what_is_trained
from sharpmoe.planning.advice import RESERVE, Advice, usable
from sharpmoe.planning.estimate import Budget, Estimate
from sharpmoe.planning.memory import Memory
from sharpmoe.train.rollout_schedules import rollout_steps

_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))

# Rows of the memory table: field of Memory, and what it is.
_STATE = {
    "weights": "weights, {dtype}, {part}",
    "masters": "float32 masters",
    "gradients": "gradients, this rank's part",
    "optimizer": "optimizer states ({optimizer})",
    "ema": "EMA",
}
_COLUMNS = (
    "schedule",
    "activations",
    "gathered",
    "sums",
    "gradients",
    "buckets",
    "peak",
    "fits",
    "gathers",
    "reduce",
    "all-to-all",
)


def _size(count: float) -> str:
    """Return bytes in a unit that leaves one to four digits."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def as_text(budget: Budget, advice: Advice, device_memory: float, notes: Sequence[str] = ()) -> str:
    """Return the plan as text: the run, what stays from step to step, each schedule, notes, warnings."""
    said = [*notes, *advice.notes]
    blocks = [
        _head(budget),
        _state(budget.own.memory, budget),
        _schedules(budget, device_memory),
        *(["\n".join(f"note: {note}" for note in said)] if said else []),
        *([_warnings(advice, device_memory)] if advice.warnings else []),
    ]
    return "\n\n".join(blocks)


def memory_lines(run: RunConfig, estimate: Estimate, device_memory: float | None) -> list[str]:
    """Return the memory plan of one layout and schedule in a few lines. device_memory: GiB, None where unknown."""
    memory, room = estimate.memory, ""
    if device_memory is not None:
        fits = "fits" if memory.peak <= usable(device_memory) else "may not fit"
        room = f" of {device_memory:.1f} GiB ({fits})"
    state = memory.state - memory.host
    is_part = what_is_trained(run) != ""
    lines = [
        f"  {'memory':<11}{_size(memory.peak)} per rank at the peak as planned{room}",
        f"  {'':<11}{_size(state)} stay: weights, masters, gradients, optimizer, EMA; {_size(memory.backward)} in a "
        f"backward, {_size(memory.activations)} of it activations",
    ]
    if is_part:
        lines.append(
            f"  {'':<11}{_size(memory.training)} for what is trained (masters, gradients, optimizer, EMA), "
            f"{_size(memory.weights)} for weights, the frozen ones included"
        )
    if memory.look:
        lines.append(f"  {'':<11}{_size(memory.look)} while it measures (log.*)")
    if memory.judge:
        lines.append(f"  {'':<11}{_size(memory.judge)} of what stays are the network of log.metrics_extractor")
    if memory.host:
        lines.append(f"  {'':<11}{_size(memory.host)} per rank in host memory (offloaded)")
    return lines


def _head(budget: Budget) -> str:
    run, layout = budget.run, budget.own.layout
    model, trained = run.model, trained_title(run, budget.trained_parameters)
    updated = optimizer_title(planned_model(run), run)
    experts = f", {budget.expert_parameters / 1e6:.3f} M in experts" if budget.expert_parameters else ""
    rows = {
        "run": f"{run.name}: {run.stage}, {model.title}, {budget.parameters / 1e6:.3f} M parameters{experts}",
        **({"trained": trained} if trained else {}),
        **({"updated": updated} if updated else {}),
        "layout": f"{layout.world} rank(s), ep {layout.ep_size} (experts are partitioned over "
        f"{layout.world // layout.ep_size} rank(s)), ZeRO-{layout.zero.stage}, {run.train.precision}",
        "batch": f"{layout.micro_batch} image(s) per rank x {layout.accumulation} accumulation, "
        f"{budget.tokens} tokens per image, T = {rollout_steps(run)}",
    }
    return "\n".join(f"{name:<8}{value}" for name, value in rows.items())


def _state(memory: Memory, budget: Budget) -> str:
    names = {
        "dtype": budget.run.train.precision,
        "part": "this rank's part" if budget.own.layout.zero.stage == 3 else "whole",
        "optimizer": budget.run.optim.name,
    }
    rows = [(name.format(**names), getattr(memory, field)) for field, name in _STATE.items()]
    rows += [("network of log.metrics_extractor", memory.judge)] if memory.judge else []
    rows.append(("from step to step", memory.state))
    rows += [("in host memory", memory.host)] if memory.host else []
    lines = [f"  {name:<32}{_size(value):>12}" for name, value in rows]
    lines += [f"  {'monitor (log.*), while it runs':<32}{_size(memory.look):>12}"] if memory.look else []
    return "\n".join(["bytes per rank", *lines])


def _schedules(budget: Budget, device_memory: float) -> str:
    rows = [_COLUMNS, *(_row(estimate, device_memory) for estimate in budget.estimates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join(
        [
            "by schedule: bytes per rank at the peak, and bytes that a rank sends per optimizer step",
            lines[0],
            "  " + "-" * (len(lines[0]) - 2),
            *lines[1:],
            f"  The first is the run as configured. Usable: {_size(usable(device_memory))}, {device_memory:g} GiB "
            f"less {RESERVE:.0%} for the context, workspaces and fragments.",
        ]
    )


def _row(estimate: Estimate, device_memory: float) -> tuple[str, ...]:
    memory, traffic = estimate.memory, estimate.traffic
    kept = (memory.activations, memory.gathered, memory.sums, memory.whole_gradients, memory.buckets, memory.peak)
    fits = "yes" if memory.peak <= usable(device_memory) else "NO"
    moved = (traffic.gathers, traffic.reductions, traffic.exchanges + traffic.pool)
    return (estimate.schedule.name, *map(_size, kept), fits, *map(_size, moved))


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
    return "  " + "  ".join([f"{row[0]:<{widths[0]}}", *cells])


def _warnings(advice: Advice, device_memory: float) -> str:
    lines = [f"warning: {warning}" for warning in advice.warnings]
    lines += [
        f"  would fit: {other.title}: {_size(other.memory.peak)}, sends {_size(other.traffic.total)} per step"
        for other in advice.fits
    ]
    return "\n".join(lines)


def as_json(budget: Budget, advice: Advice, device_memory: float, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the same as plain numbers: bytes, and the layout that they belong to."""
    layout = budget.own.layout
    return {
        "run": budget.run.name,
        "tokens": budget.tokens,
        "parameters": budget.parameters,
        "expert_parameters": budget.expert_parameters,
        "trained_parameters": budget.trained_parameters,
        "layout": {**layout._asdict(), "zero": asdict(layout.zero)},
        "device_bytes": device_memory * 2**30,
        "usable_bytes": usable(device_memory),
        "schedules": [_estimate_json(estimate, device_memory) for estimate in budget.estimates],
        "notes": [*notes, *advice.notes],
        "warnings": list(advice.warnings),
        "would_fit": [
            {"ep_size": other.layout.ep_size, "stage": other.layout.zero.stage, **_estimate_json(other, device_memory)}
            for other in advice.fits
        ],
    }


def _estimate_json(estimate: Estimate, device_memory: float) -> dict[str, Any]:
    memory, traffic = estimate.memory, estimate.traffic
    return {
        "schedule": estimate.schedule.name,
        "memory": {**asdict(memory), "state": memory.state, "training": memory.training, "peak": memory.peak},
        "traffic": {**traffic._asdict(), "total": traffic.total},
        "fits": memory.peak <= usable(device_memory),
    }
