"""The recursive denoising rollout (SharpMoE section 3.2): each step reads the clean latent predicted by the one before.

A trajectory is one pair (x0, x1) at T descending times, or one x0 with noise drawn anew at each of them; states of the
model's own (`with_own_state`) are written as the noise that makes them from x0. x0_prev, which the saliency routers
read, is x_{t_1} itself at step 1 and the detached x0_hat of step k - 1 at step k. Nothing here communicates or draws
random numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.flow import clean_prediction, interpolate, own_noise, velocity_target
from sharpmoe.losses import flow_matching
from sharpmoe.model.backbone import Backbone, Condition, ModelOutput, map_condition
from sharpmoe.moe.routing import CallMode, Routing


class TrajectoryBatch(NamedTuple):
    """One micro-batch of trajectories with all randomness drawn. Latents with frames are (B, C, T, H, W)."""

    x0: Tensor  # (B, C, H, W) clean latents
    x1: Tensor  # (B, C, H, W) noise, or (T, B, C, H, W) where it is another at each step
    times: Tensor  # (T, B), descending in T
    condition: Condition
    saliency: Tensor  # (B, N) the map M

    def noise(self, step: int) -> Tensor:
        """Return the noise (B, C, H, W) of a step (0-based)."""
        return self.x1 if self.x1.ndim == self.x0.ndim else self.x1[step]

    def x_t(self, step: int) -> Tensor:
        """Return the noisy latent (B, C, H, W) of a step (0-based)."""
        return interpolate(self.x0, self.noise(step), self.times[step])


class StepOutput(NamedTuple):
    """One denoising step of a trajectory."""

    flow: Tensor  # 0-d flow matching loss
    x0_hat: Tensor  # (B, C, H, W) predicted clean latent, detached: the x0_prev of the next step
    routing: tuple[Routing, ...]  # one per MoE layer
    v_target: Tensor  # (B, C, H, W) velocity from data to noise
    t: Tensor  # (B,)


def with_own_state(batch: TrajectoryBatch, step: int, x0_hat: Tensor) -> TrajectoryBatch:
    """Return the batch whose x_t of step + 1 is the model's own Euler step from the x_t of `step` (0-based).

    x0_hat: (B, C, H, W) predicted at `step`, detached.
    """
    own = own_noise(batch.x0, batch.x_t(step), x0_hat, batch.times[step], batch.times[step + 1])
    noises = [batch.noise(each) for each in range(len(batch.times))]
    return batch._replace(x1=torch.stack([*noises[: step + 1], own, *noises[step + 2 :]]))


class Replay(NamedTuple):
    """What a first pass fixed for one step of the second.

    The routing is replayed because in half precision a near-tie can flip between the passes, and because a replayed
    choice depends on no pool of tokens: steps may share a batch.
    """

    x0_prev: Tensor | None  # (B, C, H, W) or None where the model has no saliency routers
    routing_maps: tuple[Tensor, ...]  # one per MoE layer
    cutoffs: tuple[Tensor, ...]  # one per MoE layer


def first_x0_prev(batch: TrajectoryBatch, uses_x0_prev: bool) -> Tensor | None:
    """Return x0_prev of the first step: x_{t_1}, or None where no step reads x0_prev."""
    return batch.x_t(0) if uses_x0_prev else None


def rollout_step(
    model: Backbone,
    batch: TrajectoryBatch,
    step: int,
    x0_prev: Tensor | None,
    mode: CallMode = CallMode(),
) -> StepOutput:
    """Denoise at times[step] (0-based) of the trajectories, with or without a graph as the caller's grad mode says."""
    x_t = batch.x_t(step)
    output = model(x_t, batch.times[step], batch.condition, x0_prev, mode)
    return _step_output(batch, step, x_t, output)


def replay(output: StepOutput, x0_prev: Tensor | None) -> Replay:
    """Return what a second pass needs of a step that was run with `x0_prev`."""
    records = output.routing
    return Replay(x0_prev, tuple(r.routing_map for r in records), tuple(r.cutoff.detach() for r in records))


def replay_steps(
    model: Backbone,
    batch: TrajectoryBatch,
    steps: Sequence[int],
    replays: Sequence[Replay],
    mode: CallMode = CallMode(),
) -> list[StepOutput]:
    """Run some steps (0-based) again as one batch, with the routing and x0_prev of their first pass."""
    times = [batch.times[step] for step in steps]
    x_t = [batch.x_t(step) for step in steps]
    x0_prevs = [each.x0_prev for each in replays if each.x0_prev is not None]
    maps = tuple(torch.cat(layer) for layer in zip(*(each.routing_maps for each in replays), strict=True))
    condition = _repeat(batch.condition, len(steps))
    output = model(
        torch.cat(x_t),
        torch.cat(times),
        condition,
        torch.cat(x0_prevs) if x0_prevs else None,
        mode._replace(routing_maps=maps),
    )
    return [
        _step_output(batch, step, x_t[index], _part(output, index, len(steps), each.cutoffs))
        for index, (step, each) in enumerate(zip(steps, replays, strict=True))
    ]


def _step_output(batch: TrajectoryBatch, step: int, x_t: Tensor, output: ModelOutput) -> StepOutput:
    t, v_target = batch.times[step], velocity_target(batch.x0, batch.noise(step))
    flow = flow_matching(output.v, v_target)
    return StepOutput(flow, clean_prediction(x_t, output.v.detach(), t), output.routing, v_target, t)


def _repeat(condition: Condition, times: int) -> Condition:
    return map_condition(condition, lambda field: torch.cat([field] * times))


def _part(output: ModelOutput, index: int, count: int, cutoffs: tuple[Tensor, ...]) -> ModelOutput:
    """One step's part of a batch of `count` steps. A cutoff belongs to a pool, which is a step's own."""
    shared = ("cutoff", "bias")
    records = [
        record._replace(
            cutoff=cutoff,
            **{
                name: field.chunk(count)[index]
                for name, field in record._asdict().items()
                if name not in shared and field is not None
            },
        )
        for record, cutoff in zip(output.routing, cutoffs, strict=True)
    ]
    return ModelOutput(output.v.chunk(count)[index], tuple(records))


def rollout(
    model: Backbone, batch: TrajectoryBatch, uses_x0_prev: bool, mode: CallMode = CallMode()
) -> list[StepOutput]:
    """Run all T steps in order, keeping their graphs in grad mode; x0_prev is None unless `uses_x0_prev`."""
    x0_prev = first_x0_prev(batch, uses_x0_prev)
    outputs: list[StepOutput] = []
    for step in range(len(batch.times)):
        output = rollout_step(model, batch, step, x0_prev, mode)
        outputs.append(output)
        x0_prev = output.x0_hat if uses_x0_prev else None
    return outputs
