"""The recursive denoising rollout (SharpMoE section 3.2): x0_hat is handed from step to step, detached.

A trajectory is one pair (x0, x1) at T descending times. Step 1 is guided by x_{t_1} itself, step k by the clean latent
that step k - 1 predicted. Nothing here communicates, and nothing is drawn here: all randomness comes in the item.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.flow import clean_prediction, interpolate, velocity_target
from sharpmoe.losses import flow_matching, layer_predictions
from sharpmoe.model.dit import DiT, ModelOutput
from sharpmoe.model.embed import Condition
from sharpmoe.moe.routing import Routing


class Item(NamedTuple):
    """One micro-batch of trajectories with all randomness drawn."""

    x0: Tensor  # (B, C, H, W) clean latents
    x1: Tensor  # (B, C, H, W) noise
    times: Tensor  # (T, B), descending in T
    condition: Condition
    saliency: Tensor  # (B, N) the map M


class StepOutput(NamedTuple):
    """One denoising step of a trajectory."""

    flow: Tensor  # 0-d flow matching loss
    x0_hat: Tensor  # (B, C, H, W) predicted clean latent, detached: it guides the next step
    routing: tuple[Routing, ...]  # one per MoE layer
    layer_flow: Tensor | None = None  # 0-d flow loss of the MoE layers' own predictions, where they make one


class Replay(NamedTuple):
    """What a first pass fixed for one step of the second.

    The routing is replayed because in half precision a near-tie can flip between the passes, and because a pool of
    tokens is then not asked again: steps may share a batch.
    """

    guidance: Tensor | None  # (B, C, H, W) or None for an unguided model
    routing_maps: tuple[Tensor, ...]  # one per MoE layer
    cutoffs: tuple[Tensor, ...]  # one per MoE layer


def first_guidance(item: Item, guided: bool) -> Tensor | None:
    """x_{t_1}, which guides the first step; None where the model is not guided."""
    return interpolate(item.x0, item.x1, item.times[0]) if guided else None


def rollout_step(
    model: DiT, item: Item, step: int, guidance: Tensor | None, recompute: bool = False, for_losses: bool = True
) -> StepOutput:
    """Denoise at the item's times[step] (0-based) under `guidance`; gradients are the caller's choice.

    recompute, for_losses: see `DiT.forward`.
    """
    t = item.times[step]
    x_t = interpolate(item.x0, item.x1, t)
    output = model(x_t, t, item.condition, guidance, recompute=recompute, for_losses=for_losses)
    return _step_output(model, item, t, output)


def replay(output: StepOutput, guidance: Tensor | None) -> Replay:
    """What a second pass needs of a step that was run under `guidance`."""
    records = output.routing
    return Replay(guidance, tuple(r.routing_map for r in records), tuple(r.cutoff.detach() for r in records))


def replay_steps(model: DiT, item: Item, steps: Sequence[int], replays: Sequence[Replay]) -> list[StepOutput]:
    """Run some steps (0-based) as one batch, each as the first pass had it."""
    times = [item.times[step] for step in steps]
    x_t = torch.cat([interpolate(item.x0, item.x1, t) for t in times])
    guidances = [each.guidance for each in replays if each.guidance is not None]
    maps = tuple(torch.cat(layer) for layer in zip(*(each.routing_maps for each in replays), strict=True))
    condition = _repeat(item.condition, len(steps))
    output = model(x_t, torch.cat(times), condition, torch.cat(guidances) if guidances else None, maps)
    return [
        _step_output(model, item, t, _part(output, index, len(steps), each.cutoffs))
        for index, (t, each) in enumerate(zip(times, replays, strict=True))
    ]


def _step_output(model: DiT, item: Item, t: Tensor, output: ModelOutput) -> StepOutput:
    v_target = velocity_target(item.x0, item.x1)
    flow = flow_matching(output.v, v_target)
    own = layer_predictions(output.routing, v_target, model.config.patch_size)
    x_t = interpolate(item.x0, item.x1, t)
    return StepOutput(flow, clean_prediction(x_t, output.v.detach(), t), output.routing, own)


def _repeat(condition: Condition, times: int) -> Condition:
    return type(condition)(*(torch.cat([field] * times) for field in condition))


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


def rollout(model: DiT, item: Item, guided: bool, recompute: bool = False) -> list[StepOutput]:
    """All T steps in order, each graph kept (under grad mode); x0_hat passes on where the model is guided."""
    guidance = first_guidance(item, guided)
    outputs: list[StepOutput] = []
    for step in range(len(item.times)):
        output = rollout_step(model, item, step, guidance, recompute)
        outputs.append(output)
        guidance = output.x0_hat if guided else None
    return outputs


def block_steps(num_steps: int, segment_steps: int, block: int) -> range:
    """Steps of the `block`-th of the T / S fixed blocks of S contiguous steps."""
    return range(block * segment_steps, (block + 1) * segment_steps)
