"""One optimizer step, from drawn trajectories (`train.trajectories`) to the update.

`train_step` runs them through the objective, exchanges the figures of the step between ranks in one all-reduce, and
updates the weights and everything else that is updated once per step: thresholds, biases, the EMA.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe import draws
from sharpmoe.checkpoint.manifest import Cutoffs
from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.devices import send
from sharpmoe.moe.thresholds import move_cutoffs, update_routers
from sharpmoe.parallel.ranks.launch import sum_over_ranks
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.guard import Verdict, Watch, loss_fault, next_watch, norm_fault
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import num_segments
from sharpmoe.train.tally import StepRecord, pools_trajectories
from sharpmoe.train.terms import LossTerms, routing_weight


class StepResult(NamedTuple):
    """Figures of one optimizer step, the same on every rank except `terms`."""

    losses: dict[str, float]  # mean over the global batch
    grad_norm: float  # before clipping; inf if it is not finite
    lr: float
    routing: Tensor | None  # (MoE layers, columns) float64, `routing_sums` over the global batch; if `with_routing`
    verdict: Verdict
    watch: Watch  # for the next step
    terms: Tensor  # (micro-batches, 5) float64, the fields of `LossTerms` for this rank's own micro-batches
    cutoffs: Cutoffs  # for the next step


class _Exchange(NamedTuple):
    """Figures of a step after the one all-reduce."""

    losses: Tensor  # (5,) float64, the fields of `LossTerms`, mean over micro-batches and ranks
    thresholds: Tensor | None  # (MoE layers, E) float64, mean over micro-batches and ranks
    loads: Tensor | None  # (MoE layers, E) float64, mean over micro-batches and ranks
    routing: Tensor | None  # (MoE layers, columns) float64, `routing_sums` over micro-batches and ranks
    cutoffs: Tensor | None  # (MoE layers, E) float64, mean over micro-batches and ranks


def train_step(
    engine: Engine,
    objective: Objective,
    ema: ShardEma,
    items: Sequence[TrajectoryBatch],
    step: int,
    with_routing: bool,
    watch: Watch = Watch(),  # noqa: B008 (immutable)
    cutoffs: Cutoffs = (),
) -> StepResult:
    """Train on the micro-batches `items` as optimizer step `step` (from 0); update weights, EMA, thresholds and biases.

    watch, cutoffs: of the result of the step before, to begin with none. cutoffs (MoE layers, E): scores that experts
    accept, where the steps of a trajectory are one pool (rollout.pool).

    A step whose losses, thresholds or gradient are not finite on any rank, or whose gradient norm is a spike that
    guard.skip_spikes excludes, is skipped on all ranks: parameters, optimizer, EMA, thresholds, cutoffs and biases keep
    their values, bit for bit. Communicates: the engine's collectives and one all-reduce of figures.
    """
    run = objective.run
    engine.train()
    request = StepRequest(
        tuple(items),
        _trained_segment(run, step),
        with_routing,
        routing_weight(run, step),
        _on_device(cutoffs, items[0].x0.device) if pools_trajectories(run) else None,
    )
    answer = engine(request)
    engine.backward(answer.loss)
    terms = torch.stack([torch.stack(list(record.terms)).double() for record in answer.records])
    exchange = _exchange(answer.records, terms.mean(0), engine)
    losses = dict(zip(LossTerms._fields, exchange.losses.tolist(), strict=True))
    lr = _learning_rate(run.optim, step, run.train.steps)
    fault = loss_fault(losses) or _threshold_fault(exchange)

    def admit(norm: float) -> bool:
        return not fault and not (run.guard.skip_spikes and norm_fault(norm, watch, run.guard))

    norm, applied = engine.step(lr, admit)
    if applied:
        _update_once_per_step(objective, ema, exchange)
    # The norm of a step with another fault says nothing about the usual level; inf keeps it out of the moving average.
    counted = math.inf if fault else norm
    return StepResult(
        losses=losses,
        grad_norm=norm,
        lr=lr,
        routing=exchange.routing,
        verdict=Verdict(fault or norm_fault(norm, watch, run.guard), applied),
        watch=next_watch(watch, counted, applied, run.guard),
        terms=terms,
        cutoffs=_moved(cutoffs, exchange, run.optim) if applied else cutoffs,
    )


def _on_device(cutoffs: Cutoffs, device: torch.device) -> Tensor | None:
    return send(torch.tensor(cutoffs, dtype=torch.float32), device) if cutoffs else None


def _moved(cutoffs: Cutoffs, exchange: _Exchange, optim: OptimConfig) -> Cutoffs:
    """Return the cutoffs of the next step; none where tokens of one call compete."""
    if exchange.cutoffs is None:
        return ()
    before = torch.tensor(cutoffs, dtype=torch.float64) if cutoffs else None
    moved = move_cutoffs(before, exchange.cutoffs.cpu(), optim.threshold_decay)
    return tuple(tuple(layer) for layer in moved.tolist())


def _learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first) of a run of `total_steps`.

    Linear warm-up over warmup_steps, then constant, or a half cosine that ends at final_lr in the last step.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    span = max(1, total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _trained_segment(run: RunConfig, step: int) -> int:
    """Return the segment of the rollout that optimizer step `step` trains; 0 if the schedule trains all steps."""
    count = num_segments(run)
    return draws.rollout_block(run.seed, step, count) if count > 1 else 0


def _exchange(records: Sequence[StepRecord], terms: Tensor, engine: Engine) -> _Exchange:
    """Average loss terms, candidates of thresholds and cutoffs, and loads, and add up routing sums, over all ranks.

    Communicates: one all-reduce of one float64 vector.
    """
    thresholds = _mean([record.thresholds for record in records], terms)
    loads = _mean([record.loads for record in records], terms)
    sums = [record.routing for record in records if record.routing is not None]
    routing = torch.stack(sums).sum(0) if sums else terms.new_zeros(0)
    cutoffs = _mean([record.cutoffs for record in records], terms)
    size = engine.world.size
    parts = [terms / size, thresholds / size, loads / size, routing, cutoffs / size]
    total = sum_over_ranks(torch.cat([part.flatten() for part in parts]), engine.world)
    pieces = total.split([part.numel() for part in parts])
    return _Exchange(
        pieces[0],
        pieces[1].view_as(thresholds) if thresholds.numel() else None,
        pieces[2].view_as(loads) if loads.numel() else None,
        pieces[3].view_as(routing) if routing.numel() else None,
        pieces[4].view_as(cutoffs) if cutoffs.numel() else None,
    )


def _mean(parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Return the mean over micro-batches in float64; an empty tensor if there is nothing to average."""
    present = [part.double() for part in parts if part is not None]
    return torch.stack(present).mean(0) if present else like.new_zeros(0)


def _threshold_fault(exchange: _Exchange) -> str:
    """Return what is wrong with the candidates of thresholds and cutoffs; an empty string if they are finite."""
    given = [each for each in (exchange.thresholds, exchange.cutoffs) if each is not None]
    is_finite = not given or bool(torch.stack(given).isfinite().all())
    return "" if is_finite else "an expert's threshold is not finite"


def _update_once_per_step(objective: Objective, ema: ShardEma, exchange: _Exchange) -> None:
    """Update thresholds, biases and the EMA, after the optimizer has updated the weights."""
    update_routers(objective.model.moe_layers(), exchange.thresholds, exchange.loads, objective.run.optim)
    ema.update()
