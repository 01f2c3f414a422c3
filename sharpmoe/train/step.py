"""One optimizer step: micro-batches, the one exchange of figures between ranks, and everything that moves once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe import draws
from sharpmoe.config import RunConfig
from sharpmoe.moe.thresholds import update_biases, update_thresholds
from sharpmoe.parallel.ranks.launch import sum_over_ranks
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.train.guard import Verdict, Watch, after, bad_loss, bad_norm
from sharpmoe.train.items import make_item
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.schedule import learning_rate
from sharpmoe.train.tally import StepRecord
from sharpmoe.train.terms import LossTerms

EmptyText = tuple[Tensor, Tensor, Tensor]


class StepResult(NamedTuple):
    """What one optimizer step tells, the same on every rank but for `terms`."""

    losses: dict[str, float]  # mean over the global batch
    grad_norm: float  # before clipping; infinite where it is not finite
    lr: float
    routing: Tensor | None  # (MoE layers, 4 + E) float64 sums over the global batch, where they were asked for
    verdict: Verdict
    watch: Watch  # for the next step
    terms: Tensor  # (micro-batches, 5) float64 loss terms of this rank's own micro-batches


class _Exchange(NamedTuple):
    """Figures of a step after the one all-reduce."""

    losses: Tensor  # (5,) float64, mean over micro-batches and ranks
    thresholds: Tensor | None  # (MoE layers, E) float64, likewise
    loads: Tensor | None  # (MoE layers, E) float64, likewise
    routing: Tensor | None  # (MoE layers, 4 + E) float64, summed


def prepare(
    batches: Sequence[Batch], empty_text: EmptyText, run: RunConfig, device: torch.device
) -> list[TrajectoryBatch]:
    """Move a step's micro-batches to the device and draw their randomness. Raises DataError; no communication."""
    return [make_item(to_device(batch, device), empty_text, run) for batch in batches]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move what the model sees; positions key draws made on the host and stay there."""
    return batch._replace(
        latent=batch.latent.to(device),
        text=batch.text.to(device),
        text_mask=batch.text_mask.to(device),
        pooled=batch.pooled.to(device),
        label=batch.label.to(device),
        saliency=batch.saliency.to(device),
        foreground=batch.foreground.to(device),
    )


def train_step(
    engine: Engine,
    objective: Objective,
    ema: ShardEma,
    items: Sequence[TrajectoryBatch],
    step: int,
    with_routing: bool,
    watch: Watch = Watch(),  # noqa: B008 (immutable)
) -> StepResult:
    """Train on the micro-batches `items` as optimizer step `step` (from 0); move what moves once per step.

    A step whose losses or gradient are not finite on any rank, or that spikes (see `guard`), is skipped on all:
    parameters, optimizer, EMA, thresholds and biases stay what they were, bit for bit. Communicates: the engine's
    collectives and one all-reduce of figures.
    """
    run = objective.run
    engine.train()
    answer = engine(StepRequest(tuple(items), trained_block(run, step), with_routing))
    engine.backward(answer.loss)
    terms = torch.stack([torch.stack(list(record.terms)).double() for record in answer.records])
    exchange = _exchange(answer.records, terms.mean(0), engine)
    losses = dict(zip(LossTerms._fields, exchange.losses.tolist(), strict=True))
    lr = learning_rate(run.optim, step, run.train.steps)
    fault = bad_loss(losses) or _bad_thresholds(exchange)

    def admit(norm: float) -> bool:
        return not fault and not (run.guard.skip_spikes and bad_norm(norm, watch, run.guard))

    norm, applied = engine.step(lr, admit)
    if applied:
        _move(objective, ema, exchange)
    watched = after(watch, math.inf if fault else norm, applied, run.guard)
    verdict = Verdict(fault or bad_norm(norm, watch, run.guard), applied)
    return StepResult(losses, norm, lr, exchange.routing, verdict, watched, terms)


def _bad_thresholds(exchange: _Exchange) -> str:
    good = exchange.thresholds is None or bool(exchange.thresholds.isfinite().all())
    return "" if good else "an expert's threshold is not finite"


def _move(objective: Objective, ema: ShardEma, exchange: _Exchange) -> None:
    """Move what moves once after an update: thresholds, biases, the average."""
    optim, layers = objective.run.optim, objective.model.moe_layers()
    if exchange.thresholds is not None:
        update_thresholds([layer.expert_threshold for layer in layers], exchange.thresholds, optim.threshold_decay)
    if exchange.loads is not None:
        update_biases([layer.expert_bias for layer in layers], exchange.loads, optim.bias_rate)
    ema.update()


def trained_block(run: RunConfig, step: int) -> int:
    """Which segment of the rollout is trained at optimizer step `step`; 0 where there are none."""
    if run.stage == "pretrain" or run.rollout.schedule != "segments":
        return 0
    return draws.rollout_block(run.seed, step, run.rollout.num_steps // run.rollout.segment_steps)


def _exchange(records: Sequence[StepRecord], terms: Tensor, engine: Engine) -> _Exchange:
    """Average loss terms, threshold candidates and loads, add up routing sums: one float64 vector, one all-reduce."""
    thresholds = _mean([record.thresholds for record in records], terms)
    loads = _mean([record.loads for record in records], terms)
    sums = [record.routing for record in records if record.routing is not None]
    routing = torch.stack(sums).sum(0) if sums else terms.new_zeros(0)
    size = engine.world.size
    parts = [terms / size, thresholds / size, loads / size, routing]
    total = sum_over_ranks(torch.cat([part.flatten() for part in parts]), engine.world)
    pieces = total.split([part.numel() for part in parts])
    return _Exchange(
        pieces[0],
        pieces[1].view_as(thresholds) if thresholds.numel() else None,
        pieces[2].view_as(loads) if loads.numel() else None,
        pieces[3].view_as(routing) if routing.numel() else None,
    )


def _mean(parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Mean over micro-batches, float64; empty where there is nothing to average."""
    present = [part.double() for part in parts if part is not None]
    return torch.stack(present).mean(0) if present else like.new_zeros(0)
