"""A layout, and the parameters of a run as one of its ranks sees them. Pure; nothing is allocated."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sharpmoe.config import RunConfig
from sharpmoe.model.matrices import check_matrices, hidden_matrices
from sharpmoe.model.trainable import check_trained, planned_model
from sharpmoe.parallel.zero.settings import ZeroSettings

_STATES = {"adamw": 8, "muon": 8, "sgd": 0}  # bytes of the optimizer's states per element, by optim.name
_EIGHT_BITS = 2  # the same of bitsandbytes; blocks of 256 add 0.03
_MOMENTUM = 4  # the same of what Muon updates


class RankLayout(NamedTuple):
    """How a run is spread over ranks."""

    world: int  # ranks
    ep_size: int  # ranks that share the experts of a layer
    zero: ZeroSettings
    micro_batch: int  # images per rank and engine call
    accumulation: int  # micro-batches per optimizer step


class RankParameter(NamedTuple):
    """One parameter on one rank."""

    name: str
    numel: int  # elements when it is gathered: of stacked experts this rank's only
    ranks: int  # ranks among which it is partitioned
    module: int  # index of the module that is gathered as a whole, in the order of use
    block: int | None  # index of the block that this module is; None for embedders and the final layer
    is_expert: bool
    is_trained: bool = True  # False: frozen, without gradient, master, optimizer state and average
    state_bytes: int = 8  # of the optimizer's states, per element
    matrix: int = 0  # elements of each of the matrices that Muon orthogonalises; 0: none

    @property
    def shard(self) -> int:
        """Elements of a rank's part, padded so that all parts are equal."""
        return math.ceil(self.numel / self.ranks)

    @property
    def padded(self) -> int:
        """Elements that a gather or a reduce-scatter moves."""
        return self.shard * self.ranks


def rank_parameters(run: RunConfig, world: int, ep_size: int) -> list[RankParameter]:
    """Return all parameters in the order of use; `module` counts embedders, blocks and the final layer.

    Raises ConfigError where a pattern of train.trainable, train.frozen or optim.lr_scale matches no parameter, and
    where Muon has nothing to update.
    """
    model = planned_model(run)
    check_trained([name for name, _ in model.named_parameters()], run)
    check_matrices(model, run)
    blocks = {block: index for index, block in enumerate(model.blocks)}
    owners = [(f"{name}.", blocks.get(part)) for name, part in model.gathered_units()]
    matrices = hidden_matrices(model) if run.optim.name == "muon" else {}
    states = _EIGHT_BITS if keeps_eight_bits(run) else _STATES[run.optim.name]
    parts = []
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        shared_by = ep_size if is_expert else 1
        module = next(index for index, (owner, _) in enumerate(owners) if name.startswith(owner))
        parts.append(
            RankParameter(
                name=name,
                numel=parameter.numel() // shared_by,
                ranks=world // shared_by,
                module=module,
                block=owners[module][1],
                is_expert=is_expert,
                is_trained=parameter.requires_grad,
                state_bytes=_MOMENTUM if name in matrices else states,
                matrix=matrices[name].numel if name in matrices else 0,
            )
        )
    return parts


def keeps_eight_bits(run: RunConfig) -> bool:
    """Whether the optimizer keeps its states in 8 bits."""
    return run.optim.name == "adamw" and run.optim.impl == "bitsandbytes"


def trained_parts(parts: Sequence[RankParameter]) -> list[RankParameter]:
    """Return the parameters that are not frozen."""
    return [part for part in parts if part.is_trained]
