"""The trajectories of a step: batches of the stream with their noise, times and caption dropout drawn."""

import math
from collections.abc import Sequence

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


def draw_trajectories(
    batches: Sequence[Batch], empty_text: EmptyText, run: RunConfig, device: torch.device
) -> list[TrajectoryBatch]:
    """Copy a step's micro-batches to `device` and draw their noise, times and caption dropout.

    Each draw is keyed by (seed, position), so it is the same on any layout of ranks. stage pretrain: one logit-normal
    time; posttrain: T descending times that start at first_time; both are shifted by `rollout.shift` for the tokens of
    the batch's resolution. Raises DataError if a sample has no label that the model needs. No communication. The host
    does not wait for the device.
    """
    return [_draw(batch, empty_text, run, device) for batch in batches]


def _draw(batch: Batch, empty_text: EmptyText, run: RunConfig, device: torch.device) -> TrajectoryBatch:
    _check_labels(batch, run)
    x0, noise = send(batch.latent, device), "fixed" if run.stage == "pretrain" else run.rollout.noise
    factor = flow.shift_factor(run.rollout.shift, math.prod(x0.shape[2:]) // run.model.patch_size**2)
    if run.stage == "pretrain" and run.train.times == "uniform":
        times = flow.shift_times(draws.uniform_times(run.seed, batch.position, 1), factor)
    elif run.stage == "pretrain":
        times = flow.logit_normal_times(draws.normal_times(run.seed, batch.position), factor)
    else:
        uniform = draws.uniform_times(run.seed, batch.position, run.rollout.num_steps - 1)
        times = flow.descending_times(uniform, run.rollout.first_time, factor)
    times = send(times, device)
    if noise == "fixed":
        x1 = send(draws.noise(run.seed, batch.position, x0.shape[1:]), device).to(x0.dtype)
    else:
        drawn = draws.fresh_noise(run.seed, batch.position, run.rollout.num_steps, x0.shape[1:])
        x1 = send(drawn, device).to(x0.dtype)
    if noise == "markov":
        x1 = flow.markov_noise(x1, times)
    dropped = send(draws.drop_caption(run.seed, batch.position, run.rollout.caption_dropout), device)
    condition = _condition(batch, empty_text, run, dropped)
    return TrajectoryBatch(x0, x1, times.to(x0.dtype), condition, send(batch.saliency, device))


def _check_labels(batch: Batch, run: RunConfig) -> None:
    """Raise DataError if the model is class-conditional and an image has no label, or one that it does not know.

    Labels are looked at where they were read, on the host.
    """
    if run.model.conditioning != "class":
        return
    unknown = (batch.label < 0) | (batch.label >= run.model.num_classes)
    if unknown.any():
        row = int(unknown.nonzero()[0])
        check_label(run.model, "", batch.keys[row], int(batch.label[row]))


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
