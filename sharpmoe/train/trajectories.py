"""The trajectories of a step: batches of the stream with their noise, times and caption dropout drawn."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe import draws, flow
from sharpmoe.config import RunConfig
from sharpmoe.devices import send
from sharpmoe.evaluation.labels import check_label
from sharpmoe.model.backbone import ClassCondition, Condition, TextCondition
from sharpmoe.rollout import TrajectoryBatch

EmptyText = tuple[Tensor, Tensor, Tensor]  # stored embedding of the empty caption: (L, D_text), (L,), (D_pooled)


class _Key(NamedTuple):
    """What the random numbers of a micro-batch depend on, beside the run."""

    positions: tuple[int, ...]  # (B,)
    shape: tuple[int, ...]  # of a latent


class _Numbers(NamedTuple):
    """The random numbers of a micro-batch, on the host."""

    noise: Tensor  # (B, *shape) or, drawn for every step, (T, B, *shape), float32
    times: Tensor  # (T, B) float32
    dropped: Tensor  # (B,) bool: whose caption or class is left out


class DrawnAhead:
    """The random numbers of a run, step by step: those of the next step are drawn by a thread while this one trains.

    They are keyed by positions, so that they are the same numbers. Those of the next step are known in advance as long
    as its images have the size of this one's; otherwise they are drawn when they are asked for.
    """

    def __init__(self, run: RunConfig, global_batch: int) -> None:
        self._run, self._global_batch = run, global_batch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="draws")
        self._ahead: tuple[list[_Key], Future[list[_Numbers]] | None] = ([], None)

    def take(self, keys: list[_Key]) -> list[_Numbers]:
        """Return the numbers of a step's micro-batches, and begin to draw those of the next."""
        known, drawing = self._ahead
        if drawing is not None and known == keys:
            numbers = drawing.result()
        else:
            if drawing is not None:
                drawing.cancel()  # where it has not begun
            numbers = _draw_numbers(self._run, keys)
        after = [key._replace(positions=tuple(place + self._global_batch for place in key.positions)) for key in keys]
        self._ahead = (after, self._pool.submit(_draw_numbers, self._run, after))
        return numbers

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


def draw_trajectories(
    batches: Sequence[Batch],
    empty_text: EmptyText,
    run: RunConfig,
    device: torch.device,
    ahead: DrawnAhead | None = None,
) -> list[TrajectoryBatch]:
    """Copy a step's micro-batches to `device` and draw their noise, times and caption dropout.

    Each draw is keyed by (seed, position), so it is the same on any layout of ranks. stage pretrain: one logit-normal
    time; posttrain: T descending times that start at first_time; both are shifted by `rollout.shift` for the tokens of
    the batch's resolution. ahead: draws for the next step too, meanwhile. Raises DataError if a sample has no label
    that the model needs. No communication. The host does not wait for the device.
    """
    for batch in batches:
        _check_labels(batch, run)
    keys = [_Key(tuple(batch.position.tolist()), tuple(batch.latent.shape[1:])) for batch in batches]
    numbers = _draw_numbers(run, keys) if ahead is None else ahead.take(keys)
    pairs = zip(batches, numbers, strict=True)
    return [_on_device(batch, drawn, empty_text, run, device) for batch, drawn in pairs]


def _draw_numbers(run: RunConfig, keys: Sequence[_Key]) -> list[_Numbers]:
    return [_Numbers(_noise(run, key), _times(run, key), _dropped(run, key)) for key in keys]


def _noise(run: RunConfig, key: _Key) -> Tensor:
    if run.stage == "pretrain" or run.rollout.noise == "fixed":
        return draws.noise(run.seed, key.positions, key.shape)
    return draws.fresh_noise(run.seed, key.positions, run.rollout.num_steps, key.shape)


def _times(run: RunConfig, key: _Key) -> Tensor:
    factor = flow.shift_factor(run.rollout.shift, math.prod(key.shape[1:]) // run.model.patch_size**2)
    if run.stage == "pretrain" and run.train.times == "uniform":
        return flow.shift_times(draws.uniform_times(run.seed, key.positions, 1), factor)
    if run.stage == "pretrain":
        return flow.logit_normal_times(draws.normal_times(run.seed, key.positions), factor)
    uniform = draws.uniform_times(run.seed, key.positions, run.rollout.num_steps - 1)
    return flow.descending_times(uniform, run.rollout.first_time, factor)


def _dropped(run: RunConfig, key: _Key) -> Tensor:
    return draws.drop_caption(run.seed, key.positions, run.rollout.caption_dropout)


def _on_device(
    batch: Batch, drawn: _Numbers, empty_text: EmptyText, run: RunConfig, device: torch.device
) -> TrajectoryBatch:
    x0, times = send(batch.latent, device), send(drawn.times, device)
    x1 = send(drawn.noise, device).to(x0.dtype)
    if run.stage != "pretrain" and run.rollout.noise == "markov":
        x1 = flow.markov_noise(x1, times)
    condition = _condition(batch, empty_text, run, send(drawn.dropped, device))
    return TrajectoryBatch(x0, x1, times.to(x0.dtype), condition, send(batch.saliency, device))


def _check_labels(batch: Batch, run: RunConfig) -> None:
    """Raise DataError if the model is class-conditional and an image has no label, or one that it does not know.

    Labels are looked at on the host, where they were read; a caller's own on a device are copied there once.
    """
    if run.model.conditioning != "class":
        return
    labels = batch.label.cpu()
    unknown = (labels < 0) | (labels >= run.model.num_classes)
    if unknown.any():
        row = int(unknown.nonzero()[0])
        check_label(run.model, "", batch.keys[row], int(labels[row]))


def _condition(batch: Batch, empty_text: EmptyText, run: RunConfig, dropped: Tensor) -> Condition:
    """Return the condition of a batch; images with `dropped` (B,) bool get the empty caption or the null class."""
    device = dropped.device
    if run.model.conditioning == "text":
        own = (batch.text, batch.text_mask, batch.pooled)
        (text, text_mask, text_pooled), (tokens, mask, pooled) = (
            [send(field, device) for field in fields] for fields in (own, empty_text)
        )
        return TextCondition(
            torch.where(dropped[:, None, None], tokens.to(text), text),
            torch.where(dropped[:, None], mask, text_mask),
            torch.where(dropped[:, None], pooled.to(text_pooled), text_pooled),
        )
    label = send(batch.label, device)
    null = torch.full_like(label, run.model.num_classes)
    return ClassCondition(torch.where(dropped, null, label) if run.model.class_dropout else label)
