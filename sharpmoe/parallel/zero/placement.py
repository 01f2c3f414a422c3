"""Place parameters on ranks: experts on their expert-parallel ranks, all other parameters on every rank.

DeepSpeed 0.19.8 refuses its own MoE layer under ZeRO-3, but accepts any subclass of `AutoEPMoELayer` and partitions
each parameter that is marked as an expert over its expert-data-parallel group. So an MoE layer of this project is
converted to such a subclass in place: same forward, same parameter names, this rank's experts only. The same path
serves ep_size 1 and more, ZeRO-2 and ZeRO-3 (docs/design/0006-expert-parallelism.md).
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from sharpmoe.moe.dispatch import Dispatcher
from sharpmoe.moe.experts import Experts
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.pool import Pool
from sharpmoe.parallel.experts.groups import ExpertGroups

_EXPERT_FAMILY = "autoep_expert"  # DeepSpeed's name for a parameter of an expert-data-parallel group


class _PlacedMoELayer(MoELayer, AutoEPMoELayer):
    """An `MoELayer` whose experts are spread over ranks, made by `place_experts`. No code of DeepSpeed's layer runs.

    The attributes are those that DeepSpeed's engine and checkpoints read from an `AutoEPMoELayer`.
    """

    num_experts: int
    num_local_experts: int
    ep_size: int
    ep_rank: int
    ep_group_name: str
    expert_placement_descriptor: dict[str, Any]

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: object = None
    ) -> None:
        """Keep the groups that `place_experts` has set; DeepSpeed calls this for every such layer."""
        assert not use_data_before_expert_parallel_
        assert folding_group_handles is None


def place_experts(module: nn.Module, groups: ExpertGroups, dispatcher: Dispatcher, pool: Pool) -> None:
    """Convert every MoE layer of `module` to one that holds this rank's experts only, in place. No communication.

    The experts (E, ...) of each layer may be real or on the meta device; E is a multiple of ep_size. All layers share
    `dispatcher` and `pool`.
    """
    for layer in [part for part in module.modules() if isinstance(part, MoELayer)]:
        total = layer.experts.num_experts
        assert total % groups.ep_size == 0  # check_ep_size
        layer.__class__ = _PlacedMoELayer
        assert isinstance(layer, _PlacedMoELayer)
        layer.dispatcher, layer.pool = dispatcher, pool
        layer.num_experts, layer.num_local_experts = total, total // groups.ep_size
        layer.ep_size, layer.ep_rank, layer.ep_group_name = groups.ep_size, groups.ep_rank, groups.name
        layer.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            total, layer.num_local_experts, groups.ep_size
        )
        _keep_local(layer.experts, layer, groups)


def _keep_local(experts: Experts, layer: _PlacedMoELayer, groups: ExpertGroups) -> None:
    first = layer.ep_rank * layer.num_local_experts
    for name, whole in list(experts.named_parameters()):
        part = whole.detach()[first : first + layer.num_local_experts].clone()
        local = nn.Parameter(part, requires_grad=whole.requires_grad)
        _mark_expert(local, whole.shape, layer, groups)
        setattr(experts, name, local)
    experts.num_experts = layer.num_local_experts


def _mark_expert(parameter: nn.Parameter, logical: torch.Size, layer: _PlacedMoELayer, groups: ExpertGroups) -> None:
    """Set the attributes by which DeepSpeed finds a parameter's group, and the tensor that it is a part of."""
    placement = layer.expert_placement_descriptor
    marks = {
        "allreduce": False,
        "group_name": groups.name,
        "ds_zero_placement_family": _EXPERT_FAMILY,
        "ds_zero_partition_group_name": groups.name,
        "ds_zero_partition_process_group": groups.edp_group,
        DS_AUTOEP_UC_META: {
            AUTOEP_EXPERT_PLACEMENT: placement,
            AFFINE_MAP: autoep_placement_to_affine_map(placement, list(logical)).to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: list(logical),
            AUTOEP_PARAM_EP_RANK: layer.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, layer.ep_rank)),
        },
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter holds experts, and so only a part of the whole tensor."""
    return getattr(parameter, "ds_zero_placement_family", "") == _EXPERT_FAMILY


def local_experts(name: str, module: nn.Module) -> range | None:
    """Return which experts this rank holds of parameter `name` of `module`; None for any other parameter."""
    owner, _, last = name.rpartition(".experts.")
    layer = module.get_submodule(owner) if last in ("w1", "w2", "w3") and owner else None
    if not isinstance(layer, _PlacedMoELayer):
        return None
    first = layer.ep_rank * layer.num_local_experts
    return range(first, first + layer.num_local_experts)


def gather_experts(local: Tensor, groups: ExpertGroups) -> Tensor:
    """Concatenate the ranks' experts (E / ep_size, ...) to (E, ...), on every rank. Communicates on the ep group."""
    if groups.ep_size == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(groups.ep_size)]
    dist.all_gather(parts, local.contiguous(), group=groups.ep_group)
    return torch.cat(parts)
