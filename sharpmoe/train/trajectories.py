"""The trajectories of a step: batches of the stream with their noise, times and caption dropout drawn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe import draws, flow
from sharpmoe.config import RunConfig
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
    the batch's resolution. Raises DataError if a sample has no label that the model needs. No communication.
    """
    return [_draw(_to_device(batch, device), empty_text, run) for batch in batches]


def _to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the tensors of a batch to `device`, except positions: they key random draws, which the host makes."""
    return batch._replace(
        latent=batch.latent.to(device),
        text=batch.text.to(device),
        text_mask=batch.text_mask.to(device),
        pooled=batch.pooled.to(device),
        label=batch.label.to(device),
        saliency=batch.saliency.to(device),
        foreground=batch.foreground.to(device),
    )


def _draw(batch: Batch, empty_text: EmptyText, run: RunConfig) -> TrajectoryBatch:
    x0, noise = batch.latent, "fixed" if run.stage == "pretrain" else run.rollout.noise
    factor = flow.shift_factor(run.rollout.shift, math.prod(x0.shape[2:]) // run.model.patch_size**2)
    if run.stage == "pretrain" and run.train.times == "uniform":
        times = flow.shift_times(draws.uniform_times(run.seed, batch.position, 1), factor)
    elif run.stage == "pretrain":
        times = flow.logit_normal_times(draws.normal_times(run.seed, batch.position), factor)
    else:
        uniform = draws.uniform_times(run.seed, batch.position, run.rollout.num_steps - 1)
        times = flow.descending_times(uniform, run.rollout.first_time, factor)
    if noise == "fixed":
        x1 = draws.noise(run.seed, batch.position, x0.shape[1:]).to(x0)
    else:
        x1 = draws.fresh_noise(run.seed, batch.position, run.rollout.num_steps, x0.shape[1:]).to(x0)
    if noise == "markov":
        x1 = flow.markov_noise(x1, times.to(x0.device))
    dropped = draws.drop_caption(run.seed, batch.position, run.rollout.caption_dropout).to(x0.device)
    return TrajectoryBatch(x0, x1, times.to(x0), _condition(batch, empty_text, run, dropped), batch.saliency)


def _condition(batch: Batch, empty_text: EmptyText, run: RunConfig, dropped: Tensor) -> Condition:
    """Return the condition of a batch; images with `dropped` (B,) bool get the empty caption or the null class.

    Raises DataError if the model is class-conditional and an image has no label, or one that the model does not know.
    """
    if run.model.conditioning == "text":
        tokens, mask, pooled = (field.to(batch.latent.device) for field in empty_text)
        return TextCondition(
            torch.where(dropped[:, None, None], tokens.to(batch.text), batch.text),
            torch.where(dropped[:, None], mask, batch.text_mask),
            torch.where(dropped[:, None], pooled.to(batch.pooled), batch.pooled),
        )
    unknown = (batch.label < 0) | (batch.label >= run.model.num_classes)
    if unknown.any():
        row = int(unknown.nonzero()[0])
        check_label(run.model, "", batch.keys[row], int(batch.label[row]))
    null = torch.full_like(batch.label, run.model.num_classes)
    return ClassCondition(torch.where(dropped, null, batch.label) if run.model.class_dropout else batch.label)
