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
from sharpmoe.model.dit import DiT
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
    """What pass 1 fixed for one step of pass 2."""

    guidance: Tensor | None  # (B, C, H, W) or None for an unguided model
    routing_maps: tuple[Tensor, ...] | None  # one per MoE layer


def first_guidance(item: Item, guided: bool) -> Tensor | None:
    """x_{t_1}, which guides the first step; None where the model is not guided."""
    return interpolate(item.x0, item.x1, item.times[0]) if guided else None


def rollout_step(
    model: DiT,
    item: Item,
    step: int,
    guidance: Tensor | None,
    routing_maps: tuple[Tensor, ...] | None = None,
    recompute: bool = False,
) -> StepOutput:
    """Denoise at the item's times[step] (0-based) under `guidance`; gradients are the caller's choice."""
    t = item.times[step]
    x_t = interpolate(item.x0, item.x1, t)
    output = model(x_t, t, item.condition, guidance, routing_maps, recompute)
    v_target = velocity_target(item.x0, item.x1)
    flow = flow_matching(output.v, v_target)
    own = layer_predictions(output.routing, v_target, model.config.patch_size)
    return StepOutput(flow, clean_prediction(x_t, output.v.detach(), t), output.routing, own)


def rollout(model: DiT, item: Item, guided: bool, recompute: bool = False) -> list[StepOutput]:
    """All T steps in order, each graph kept (under grad mode); x0_hat passes on where the model is guided."""
    guidance = first_guidance(item, guided)
    outputs: list[StepOutput] = []
    for step in range(len(item.times)):
        output = rollout_step(model, item, step, guidance, recompute=recompute)
        outputs.append(output)
        guidance = output.x0_hat if guided else None
    return outputs


def replays(item: Item, outputs: Sequence[StepOutput], guided: bool) -> list[Replay]:
    """Guidance and routing of every step as pass 1 had them, for pass 2.

    The routing is replayed because in half precision a near-tie can flip between the passes.
    """
    guidances = [first_guidance(item, guided), *(output.x0_hat if guided else None for output in outputs[:-1])]
    return [
        Replay(guidance, tuple(record.routing_map for record in output.routing))
        for guidance, output in zip(guidances, outputs, strict=True)
    ]


def block_steps(num_steps: int, segment_steps: int | None, block: int) -> range:
    """Steps of the `block`-th of the T / S fixed blocks of S contiguous steps; all T steps where S is None."""
    if segment_steps is None:
        return range(num_steps)
    return range(block * segment_steps, (block + 1) * segment_steps)


def detach_records(outputs: Sequence[StepOutput]) -> tuple[tuple[Routing, ...], ...]:
    """Routing records of every step, cut from the graph: (T) x (layers)."""
    with torch.no_grad():
        return tuple(tuple(record.detach() for record in output.routing) for output in outputs)
