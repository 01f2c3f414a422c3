"""The model that the monitor measures: whole on every rank, or with its blocks made whole only while they run.

Both give the same numbers bit for bit, and neither writes to what is trained: weights are copied out of this rank's
shards of the masters or of their average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks, sum_over_ranks
from sharpmoe.parallel.zero.partitions import Piece

_LARGE = 2**29  # parameters: 2 GiB in float32


def looks_by_block(run: RunConfig, num_parameters: int) -> bool:
    """Whether the run's measurements make one block whole at a time.

    A model with adapters is made whole: they are merged into the weights that they are beside, which are frozen.
    Raises ConfigError where it is to be made by block all the same (`check_looks`).
    """
    check_looks(run)
    if run.log.look_weights == "whole" or run.lora.rank:
        return False
    return run.log.look_weights == "blocks" or num_parameters > _LARGE


def check_looks(run: RunConfig) -> None:
    """Raise ConfigError where log.look_weights asks for what adapters do not allow."""
    if run.log.look_weights == "blocks" and run.lora.rank:
        raise ConfigError(
            f"log.look_weights is blocks, but lora.rank is {run.lora.rank}: adapters are merged into a whole "
            "model, not into one block at a time; set log.look_weights to auto or whole"
        )


def look_dtype(run: RunConfig) -> torch.dtype:
    """Return the dtype of the parameters with which a run's measurements compute."""
    return torch.bfloat16 if run.log.look_precision == "bf16" else torch.float32


def fill_by_block(
    twin: Backbone, shards: Sequence[Tensor], pieces: Sequence[Piece], world: World, dtype: torch.dtype = torch.float32
) -> None:
    """Give a model on the meta device its weights: all but the blocks now, those of a block whenever it runs.

    They are summed in float32 and then rounded to `dtype`. shards: this rank's flat partitions, float32 or, of what is
    frozen, in the precision of the forward; pieces: where the model's parameters are in them, over all ranks each
    element once. Communicates: one sum per part now, and one per block and call, so all ranks must call the model
    equally often; a rank that fails is met by the others before the next block. Buffers stay on the meta device.
    """
    blocks = set(twin.blocks)
    for name, unit in twin.gathered_units():
        of_unit = [piece for piece in pieces if piece.name.startswith(f"{name}.")]
        fill = partial(_fill, shards, of_unit, name, world, dtype)
        if unit in blocks:
            unit.register_forward_pre_hook(fill)
            unit.register_forward_hook(_empty, always_call=True)
        else:
            fill(unit)
    setattr(twin, "prepare", _unprepared)  # noqa: B010 - it reads blocks outside of their forward, only to save time


def _fill(
    shards: Sequence[Tensor],
    pieces: Sequence[Piece],
    prefix: str,
    world: World,
    dtype: torch.dtype,
    unit: nn.Module,
    *_: Any,
) -> None:
    parameters = dict(unit.named_parameters())
    with raise_on_all_ranks(world):
        whole = torch.zeros(sum(each.numel() for each in parameters.values()), device=world.device)
        parts = dict(zip(parameters, whole.split([each.numel() for each in parameters.values()]), strict=True))
        for piece in pieces:
            target = parts[piece.name.removeprefix(f"{prefix}.")][piece.place : piece.place + piece.numel]
            target.copy_(shards[piece.part].detach()[piece.start : piece.start + piece.numel])
    found = sum_over_ranks(whole, world).to(dtype).split([each.numel() for each in parameters.values()])
    for (name, planned), values in zip(parameters.items(), found, strict=True):
        _replace(unit, name, values.view(planned.shape))


def _empty(unit: nn.Module, *_: Any) -> None:
    for name, parameter in list(unit.named_parameters()):
        _replace(unit, name, torch.empty_like(parameter, device="meta"))


def _replace(unit: nn.Module, name: str, values: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(unit.get_submodule(owner), last, nn.Parameter(values, requires_grad=False))


def _unprepared(condition: Any) -> Any:
    return condition
