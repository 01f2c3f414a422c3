"""Held-out rollouts with fixed noise, divided evenly and reproducibly between ranks.

The images are cut into the same chunks whatever the number of ranks (DiffMoE pools the tokens of a call, so the chunk
is part of the measurement), every rank makes the same number of model calls (a partitioned model needs all ranks), and
each rank fills its rows of tables of zeros that the ranks then add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe import draws
from sharpmoe.config import ModelConfig
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, TextCondition
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import StepOutput, TrajectoryBatch, rollout


class Samples(Protocol):
    """What held-out shards offer; a `data_pipeline.read.shards.ShardSet` is one."""

    @property
    def num_samples(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read the samples at `indices`, all of one bucket."""
        ...

    def bucket_of(self, index: int) -> str:
        """Name of a sample's resolution."""
        ...


class Share(NamedTuple):
    """This rank's part of the work."""

    rank: int = 0
    world: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda table: table  # sum of a tensor over all ranks, returned on each


ALONE = Share()


class _Chunk(NamedTuple):
    """Images that share the model calls of one rollout."""

    rows: range  # rows of the tables
    counted: bool  # False: repeated only so that all ranks make the same number of calls


class Observed(NamedTuple):
    """Measurements of held-out rollouts: I images, T times, N tokens. The same on every rank, on the CPU."""

    experts: Tensor  # (I, T, N) float32: experts that took the token, summed over MoE layers
    flow: Tensor  # (I, T) float32: flow-matching loss
    saliency: Tensor  # (I, N) float32 in [0, 1]
    foreground: Tensor  # (I, N) float32 in [0, 1], NaN for images without a mask


def observe(
    model: Backbone,
    samples: Samples,
    indices: Sequence[int],
    times: Sequence[float],
    *,
    seed: int = 0,
    chunk: int = 16,
    share: Share = ALONE,
) -> Observed:
    """Roll the model out over held-out samples at fixed descending times in (0, 1], as it was trained.

    x0_prev is x_t itself at step 1 and the model's own x0_hat of step k - 1 at step k; a model without a saliency
    router reads none. Captions are kept, noise is keyed by (seed, sample index), `chunk` images share a model call.
    Runs in eval mode without gradients and restores the mode. Communicates by `share.reduce` alone, once per table.
    """
    device = next(model.parameters()).device
    tables: Observed | None = None
    with evaluating(model):
        for rows, counted in _chunks_of_rank([samples.bucket_of(index) for index in indices], chunk, share):
            picked = [indices[row] for row in rows]
            batch = samples.batch(picked)
            item = _held_out_batch(batch, picked, times, model.config, seed, device)
            seen = _observed(batch, item, rollout(model, item, uses_x0_prev=model.config.saliency_router))
            tables = tables or Observed(*(part.new_zeros(len(indices), *part.shape[1:]) for part in seen))
            if counted:
                for table, part in zip(tables, seen, strict=True):
                    table[rows.start : rows.stop] = part
    if tables is None:
        raise ValueError("no held-out samples to observe")
    return Observed(*(share.reduce(table.to(device)).cpu() for table in tables))


def spread(num_samples: int, count: int) -> list[int]:
    """Return at most `count` sample indices, evenly spread over a split of `num_samples`."""
    count = min(count, num_samples)
    return [i * num_samples // count for i in range(count)]


def _chunks_of_rank(buckets: Sequence[str], chunk: int, share: Share) -> list[_Chunk]:
    """Return the chunks of one rank: every world-th of all; the last chunk again, uncounted, where it would have fewer.

    `buckets`: bucket of every row; a chunk is of one bucket.
    """
    edges = [row for row in range(1, len(buckets)) if buckets[row] != buckets[row - 1]]
    runs = list(pairwise([0, *edges, len(buckets)]))
    chunks = [range(at, min(at + chunk, stop)) for start, stop in runs for at in range(start, stop, chunk)]
    mine = range(share.rank, -(-len(chunks) // share.world) * share.world, share.world)
    return [_Chunk(chunks[min(i, len(chunks) - 1)], i < len(chunks)) for i in mine]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients for a while, and back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _held_out_batch(
    batch: Batch, indices: Sequence[int], times: Sequence[float], config: ModelConfig, seed: int, device: torch.device
) -> TrajectoryBatch:
    """Build trajectories of held-out samples: captions kept, noise keyed by (seed, index), the same times for all."""
    x0 = batch.latent.to(device)
    x1 = draws.noise(seed, indices, x0.shape[1:], draws.Purpose.VALIDATION_NOISE).to(device)
    steps = torch.tensor(times, dtype=torch.float32, device=device)[:, None].repeat(1, len(x0))
    return TrajectoryBatch(x0, x1, steps, _condition(batch, config, device), batch.saliency.to(device))


def _condition(batch: Batch, config: ModelConfig, device: torch.device) -> Condition:
    """Build the condition of a batch that the model takes: its class labels or its captions, nothing dropped."""
    if config.conditioning == "class":
        return ClassCondition(batch.label.to(device))
    return TextCondition(batch.text.to(device), batch.text_mask.to(device), batch.pooled.to(device))


def _flow_losses(item: TrajectoryBatch, steps: Sequence[StepOutput]) -> Tensor:
    """Return the flow loss of every image and time (B, T) float32, from x0_hat - x0 = t (v_target - v)."""
    errors = [(step.x0_hat.float() - item.x0).square().flatten(1).mean(1) for step in steps]
    return (torch.stack(errors) / item.times.square()).T


def _experts_per_token(routing: Sequence[Routing]) -> Tensor:
    """Count the experts that took each token in one model call, summed over its MoE layers: (B, N) float32."""
    return torch.stack([layer.routing_map.sum(-1) for layer in routing]).sum(0).float()


def _observed(batch: Batch, item: TrajectoryBatch, steps: Sequence[StepOutput]) -> Observed:
    dense = torch.zeros_like(item.saliency)  # no MoE layer: no token is taken by an expert
    experts = torch.stack([_experts_per_token(step.routing) if step.routing else dense for step in steps], 1)
    return Observed(experts.cpu(), _flow_losses(item, steps).cpu(), batch.saliency, batch.foreground)
