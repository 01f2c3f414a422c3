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
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.index import Bucket
from data_pipeline.schema import Batch
from sharpmoe import draws
from sharpmoe.config import ModelConfig
from sharpmoe.console import progress_bar
from sharpmoe.devices import send
from sharpmoe.evaluation.labels import check_labels_of_batch
from sharpmoe.flow import markov_noise
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, TextCondition
from sharpmoe.moe.influence import INFLUENCE_COLUMNS, choice_of_gate, influence
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import StepOutput, TrajectoryBatch, rollout

Noise = Literal["fixed", "fresh", "markov"]  # as `rollout.noise`


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
    flow: Tensor  # (I, T, N) float32: flow-matching loss of the token's latent pixels


class Observed(NamedTuple):
    """Measurements of held-out rollouts: I images, T times, L MoE layers. The same on every rank, on the CPU."""

    flow: Tensor  # (I, T) float32: flow-matching loss
    influence: Tensor  # (I, T, L, 6) float32: the sums of `moe.influence.influence`
    loads: Tensor  # (I, T, L, E) float32: tokens of the image that each expert took, an unconditional expert last
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
    noise: Noise = "fixed",
    quiet: bool = False,
    layers: slice = slice(None),
) -> Observed:
    """Roll the model out over held-out samples at fixed descending times in (0, 1], as it was trained.

    x0_prev is x_t itself at step 1 and the model's own x0_hat of step k - 1 at step k; a model without a saliency
    router reads none. noise: one x1 per image, an independent one at each step, or that of a Markov chain
    (`flow.markov_noise`), in which x0_prev tells nothing about x0 that x_t does not, as in sampling. Captions are kept,
    noise is keyed by (seed, sample index), `chunk` images share a model call; quiet: no progress bar; layers: MoE
    layers, in depth order, whose experts per token are counted.
    Runs in eval mode without gradients and restores the mode. Communicates by `share.reduce` alone, once per table.
    """
    if not len(indices):
        raise ValueError("no held-out samples to observe")
    device, names = next(model.parameters()).device, [samples.bucket_of(index) for index in indices]
    runs = _runs(names)
    tables = [_zeros(run, samples.buckets[names[run.start]], len(times)) for run in runs]
    flow = torch.zeros(len(indices), len(times))
    routers = torch.zeros(len(indices), len(times), len(model.moe_layers()), INFLUENCE_COLUMNS)
    loads = torch.zeros(*routers.shape[:3], model.config.total_experts)
    chunks = chunks_of_rank(runs, chunk, share)
    what = "measuring held-out images" + (f", {noise} noise" if noise != "fixed" else "")
    with evaluating(model), progress_bar(what, len(chunks), "chunk", quiet=quiet) as advance:
        for number, rows, counted in chunks:
            picked = [indices[row] for row in rows]
            batch = samples.batch(picked)
            item = _held_out_batch(batch, picked, times, model.config, seed, device, noise)
            steps = rollout(model, item, uses_x0_prev=model.config.saliency_router)
            if counted:
                flow[rows.start : rows.stop] = _flow_losses(item, steps)
                routers[rows.start : rows.stop] = _influences(model, item, steps)
                if steps[0].routing:
                    loads[rows.start : rows.stop] = _loads(steps)
                first, parts = runs[number].start, _of_tokens(batch, item, steps, model.config.patch_size, layers)
                for table, part in zip(tables[number], parts, strict=True):
                    table[rows.start - first : rows.stop - first] = part
            advance(1)
    columns = [_reduced(column, share, device) for column in zip(*tables, strict=True)]
    flow, routers, loads = _reduced([flow, routers, loads], share, device)
    return Observed(flow, routers, loads, tuple(TokenTables(*run) for run in zip(*columns, strict=True)))


def spread(num_samples: int, count: int) -> list[int]:
    """Return at most `count` sample indices, evenly spread over a split of `num_samples`."""
    count = min(count, num_samples)
    return [i * num_samples // count for i in range(count)]


def _runs(names: Sequence[str]) -> list[range]:
    """Return the rows of each run of equal names."""
    edges = [row for row in range(1, len(names)) if names[row] != names[row - 1]]
    return [range(start, stop) for start, stop in pairwise([0, *edges, len(names)])]


def chunks_of_rank(runs: Sequence[range], chunk: int, share: Share) -> list[_Chunk]:
    """Return the chunks of one rank: every world-th of all; the last chunk again, uncounted, where it would have fewer.

    `runs`: rows of one resolution each, as a chunk is.
    """
    chunks = [(number, range(at, min(at + chunk, run.stop))) for number, run in enumerate(runs) for at in run[::chunk]]
    mine = range(share.rank, -(-len(chunks) // share.world) * share.world, share.world)
    return [_Chunk(*chunks[min(i, len(chunks) - 1)], i < len(chunks)) for i in mine]


def _zeros(run: range, bucket: Bucket, num_times: int) -> TokenTables:
    images, tokens = len(run), math.prod(bucket.grid)
    by_time, once = (images, num_times, tokens), (images, tokens)
    return TokenTables(torch.zeros(by_time), torch.zeros(once), torch.zeros(once), torch.zeros(by_time))


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
    batch: Batch,
    indices: Sequence[int],
    times: Sequence[float],
    config: ModelConfig,
    seed: int,
    device: torch.device,
    noise: Noise = "fixed",
) -> TrajectoryBatch:
    """Build trajectories of held-out samples: captions kept, noise keyed by (seed, index), the same times for all."""
    x0, purpose = send(batch.latent, device), draws.Purpose.VALIDATION_NOISE
    steps = send(torch.tensor(times, dtype=torch.float32), device)[:, None].repeat(1, len(x0))
    if noise == "fixed":
        x1 = send(draws.noise(seed, indices, x0.shape[1:], purpose), device)
    else:
        x1 = send(draws.fresh_noise(seed, indices, len(times), x0.shape[1:], purpose), device)
    if noise == "markov":
        x1 = markov_noise(x1, steps)
    return TrajectoryBatch(x0, x1, steps, held_out_condition(batch, config, device), send(batch.saliency, device))


def held_out_condition(batch: Batch, config: ModelConfig, device: torch.device) -> Condition:
    """Build the condition of a batch that the model takes: its class labels or its captions, nothing dropped.

    Raises DataError for a label that the model has no class for.
    """
    if config.conditioning == "class":
        check_labels_of_batch(config, batch.label, batch.keys)
        return ClassCondition(send(batch.label, device))
    return TextCondition(*(send(part, device) for part in (batch.text, batch.text_mask, batch.pooled)))


def _flow_losses(item: TrajectoryBatch, steps: Sequence[StepOutput]) -> Tensor:
    """Return the flow loss of every image and time (B, T) float32, from x0_hat - x0 = t (v_target - v)."""
    errors = [(step.x0_hat.float() - item.x0).square().flatten(1).mean(1) for step in steps]
    return (torch.stack(errors) / item.times.square()).T


def _experts_per_token(routing: Sequence[Routing]) -> Tensor:
    """Count the experts that took each token in one model call, summed over its MoE layers: (B, N) float32."""
    return torch.stack([layer.routing_map.sum(-1) for layer in routing]).sum(0).float()


def _loads(steps: Sequence[StepOutput]) -> Tensor:
    """Count the tokens of each image that every expert took, (B, T, L, E) float32."""
    return torch.stack(
        [torch.stack([layer.routing_map.sum(1) for layer in step.routing], 1) for step in steps], 1
    ).float()


def _flow_of_tokens(item: TrajectoryBatch, steps: Sequence[StepOutput], patch_size: int) -> Tensor:
    """Return the flow loss of every token (B, T, N) float32; its mean over the tokens is that of the image."""
    errors = [(step.x0_hat.float() - item.x0).square().mean(1, keepdim=True) for step in steps]
    pooled = [functional.avg_pool2d(error.flatten(1, -3), patch_size).flatten(1) for error in errors]
    return torch.stack(pooled, 1) / item.times.T.square().unsqueeze(-1)


def _influences(model: Backbone, item: TrajectoryBatch, steps: Sequence[StepOutput]) -> Tensor:
    """Return `influence` of every image, time and MoE layer, (B, T, L, 6) float32."""
    layers = model.moe_layers()
    if not layers:
        return item.saliency.new_zeros(len(item.x0), len(steps), 0, INFLUENCE_COLUMNS)
    thresholds = [getattr(layer, "expert_threshold", None) for layer in layers]
    found = [
        influence(record, choice_of_gate(record, layer.config, tau, training=False), item.saliency)
        for step in steps
        for record, layer, tau in zip(step.routing, layers, thresholds, strict=True)
    ]
    return torch.stack(found, 1).unflatten(1, (len(steps), len(layers))).float()


def _of_tokens(
    batch: Batch, item: TrajectoryBatch, steps: Sequence[StepOutput], patch_size: int, layers: slice
) -> TokenTables:
    dense = torch.zeros_like(item.saliency)  # no MoE layer: no token is taken by an expert
    experts = torch.stack([_experts_per_token(step.routing[layers]) if step.routing else dense for step in steps], 1)
    return TokenTables(experts, batch.saliency, batch.foreground, _flow_of_tokens(item, steps, patch_size))
