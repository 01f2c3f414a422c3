"""From a batch of the stream to a micro-batch of trajectories: all randomness is drawn here."""

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe import draws, flow
from sharpmoe.config import RunConfig
from sharpmoe.errors import DataError
from sharpmoe.model.embed import ClassCondition, Condition, TextCondition
from sharpmoe.rollout import TrajectoryBatch


def make_item(batch: Batch, empty_text: tuple[Tensor, Tensor, Tensor], run: RunConfig) -> TrajectoryBatch:
    """Draw noise, times and caption dropout for a batch, each keyed by (seed, position): the same on any rank layout.

    `empty_text`: stored embedding of the empty caption, (L, D_text), (L,), (D_pooled). stage pretrain: one
    logit-normal time; posttrain: T descending times starting at first_time. Tensors land on the batch's device.
    """
    x0 = batch.latent
    x1 = draws.noise(run.seed, batch.position, x0.shape[1:]).to(x0)
    if run.stage == "pretrain":
        times = flow.logit_normal_times(draws.normal_times(run.seed, batch.position))
    else:
        uniform = draws.uniform_times(run.seed, batch.position, run.rollout.num_steps - 1)
        times = flow.descending_times(uniform, run.rollout.first_time)
    dropped = draws.drop_caption(run.seed, batch.position, run.rollout.caption_dropout).to(x0.device)
    return TrajectoryBatch(x0, x1, times.to(x0), make_condition(batch, empty_text, run, dropped), batch.saliency)


def make_condition(
    batch: Batch, empty_text: tuple[Tensor, Tensor, Tensor], run: RunConfig, dropped: Tensor
) -> Condition:
    """Condition of a batch with the `dropped` (B,) bool replaced by the empty caption, or by the null class."""
    if run.model.conditioning == "text":
        tokens, mask, pooled = (field.to(batch.latent.device) for field in empty_text)
        return TextCondition(
            torch.where(dropped[:, None, None], tokens.to(batch.text), batch.text),
            torch.where(dropped[:, None], mask, batch.text_mask),
            torch.where(dropped[:, None], pooled.to(batch.pooled), batch.pooled),
        )
    if (batch.label < 0).any():
        key = batch.keys[int((batch.label < 0).nonzero()[0])]
        raise DataError(f"sample {key} has no class label, but model.conditioning is class: use conditioning text")
    null = torch.full_like(batch.label, run.model.num_classes)
    return ClassCondition(torch.where(dropped, null, batch.label) if run.model.class_dropout else batch.label)
