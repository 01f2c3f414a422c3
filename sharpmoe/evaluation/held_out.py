"""Held-out rollouts with fixed noise, divided evenly and reproducibly between ranks.

The images are cut into the same chunks whatever the number of ranks (DiffMoE pools the tokens of a call, so the chunk
is part of the measurement), every rank makes the same number of model calls (a partitioned model needs all ranks), and
each rank fills its rows of tables of zeros that the ranks then add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.index import Bucket
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

    @property
    def buckets(self) -> Mapping[str, Bucket]:
        """The resolutions by name."""
        ...

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

    run: int  # number of the run of one resolution that they belong to
    rows: range  # rows of all images
    counted: bool  # False: repeated only so that all ranks make the same number of calls


class TokenTables(NamedTuple):
    """What was measured of every token of I images of one resolution: T times, N tokens."""

    experts: Tensor  # (I, T, N) float32: experts that took the token, summed over MoE layers
    saliency: Tensor  # (I, N) float32 in [0, 1]
    foreground: Tensor  # (I, N) float32 in [0, 1], NaN for images without a mask


class Observed(NamedTuple):
    """Measurements of held-out rollouts: I images, T times. The same on every rank, on the CPU."""

    flow: Tensor  # (I, T) float32: flow-matching loss
    tokens: tuple[TokenTables, ...]  # one per run of images of one resolution, in the order of the images


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
    if not len(indices):
        raise ValueError("no held-out samples to observe")
    device, names = next(model.parameters()).device, [samples.bucket_of(index) for index in indices]
    runs = _runs(names)
    tables = [_zeros(run, samples.buckets[names[run.start]], len(times)) for run in runs]
    flow = torch.zeros(len(indices), len(times))
    with evaluating(model):
        for number, rows, counted in _chunks_of_rank(runs, chunk, share):
            picked = [indices[row] for row in rows]
            batch = samples.batch(picked)
            item = _held_out_batch(batch, picked, times, model.config, seed, device)
            steps = rollout(model, item, uses_x0_prev=model.config.saliency_router)
            if counted:
                flow[rows.start : rows.stop] = _flow_losses(item, steps)
                first = runs[number].start
                for table, part in zip(tables[number], _of_tokens(batch, item, steps), strict=True):
                    table[rows.start - first : rows.stop - first] = part
    columns = [_reduced(column, share, device) for column in zip(*tables, strict=True)]
    return Observed(_reduced([flow], share, device)[0], tuple(TokenTables(*run) for run in zip(*columns, strict=True)))


def spread(num_samples: int, count: int) -> list[int]:
    """Return at most `count` sample indices, evenly spread over a split of `num_samples`."""
    count = min(count, num_samples)
    return [i * num_samples // count for i in range(count)]


def _runs(names: Sequence[str]) -> list[range]:
    """Return the rows of each run of equal names."""
    edges = [row for row in range(1, len(names)) if names[row] != names[row - 1]]
    return [range(start, stop) for start, stop in pairwise([0, *edges, len(names)])]


def _chunks_of_rank(runs: Sequence[range], chunk: int, share: Share) -> list[_Chunk]:
    """Return the chunks of one rank: every world-th of all; the last chunk again, uncounted, where it would have fewer.

    `runs`: rows of one resolution each, as a chunk is.
    """
    chunks = [(number, range(at, min(at + chunk, run.stop))) for number, run in enumerate(runs) for at in run[::chunk]]
    mine = range(share.rank, -(-len(chunks) // share.world) * share.world, share.world)
    return [_Chunk(*chunks[min(i, len(chunks) - 1)], i < len(chunks)) for i in mine]


def _zeros(run: range, bucket: Bucket, num_times: int) -> TokenTables:
    images, tokens = len(run), math.prod(bucket.grid)
    return TokenTables(torch.zeros(images, num_times, tokens), torch.zeros(images, tokens), torch.zeros(images, tokens))


def _reduced(parts: Sequence[Tensor], share: Share, device: torch.device) -> list[Tensor]:
    """Add tensors up over the ranks, in one exchange whatever their shapes; on the CPU."""
    whole = share.reduce(torch.cat([part.flatten() for part in parts]).to(device)).cpu()
    pieces = whole.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


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


def _of_tokens(batch: Batch, item: TrajectoryBatch, steps: Sequence[StepOutput]) -> TokenTables:
    dense = torch.zeros_like(item.saliency)  # no MoE layer: no token is taken by an expert
    experts = torch.stack([_experts_per_token(step.routing) if step.routing else dense for step in steps], 1)
    return TokenTables(experts, batch.saliency, batch.foreground)
