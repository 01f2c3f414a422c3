"""Process groups of expert parallelism, built once from DeepSpeed's.

With ep_size ranks per expert-parallel group, consecutive ranks share the experts of a layer (all-to-all between them);
ranks that hold the same experts form an expert-data-parallel group (their gradients are reduced, ZeRO partitions the
experts among them). Everything else is data parallel over the whole world.
"""

from functools import cache
from typing import NamedTuple

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch.distributed import ProcessGroup

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks.launch import World


class ExpertGroups(NamedTuple):
    """This rank's place among the experts."""

    ep_size: int  # ranks that share the experts of a layer
    ep_rank: int  # this rank's place among them: it holds the ep_rank-th run of E / ep_size experts
    ep_group: ProcessGroup
    edp_group: ProcessGroup  # ranks with the same experts
    singleton: ProcessGroup  # this rank alone: Megatron-core needs an expert tensor parallel group

    @classmethod
    def of(cls, ep_size: int, world: World) -> "ExpertGroups":
        """Return the groups of `ep_size` of this rank, the same object at every call.

        The first call communicates: all ranks make it. ep_size divides world.size (`check_ep_size`).
        """
        assert world.size % ep_size == 0
        return _built(ep_size, world.rank)

    @property
    def name(self) -> str:
        """Name of the pair of groups in DeepSpeed."""
        return _name(self.ep_size)


def possible_ep_sizes(run: RunConfig, world_size: int) -> list[int]:
    """Return the numbers of ranks that can share the experts of a layer: they divide the ranks and the experts."""
    experts = run.model.total_experts if run.model.family.has_experts else 1
    return [size for size in range(1, world_size + 1) if world_size % size == 0 and experts % size == 0]


def check_ep_size(run: RunConfig, world_size: int) -> None:
    """Raise a ConfigError with the possible values where parallel.ep_size does not fit. No communication."""
    ep_size, experts, possible = run.parallel.ep_size, run.model.total_experts, possible_ep_sizes(run, world_size)
    if ep_size not in possible:
        what = f"{experts} experts per layer" if run.model.family.has_experts else "a dense model has no experts"
        raise ConfigError(
            f"parallel.ep_size is {ep_size}, allowed: {' | '.join(map(str, possible))} (it must divide {world_size} "
            f"ranks and the experts; {what}); change it or the number of ranks"
        )


@cache
def _built(ep_size: int, rank: int) -> ExpertGroups:
    deepspeed_groups._create_expert_and_data_parallel(ep_size, mp_size=1, pp_size=1)
    ep_group = deepspeed_groups._get_expert_parallel_group(_name(ep_size))
    edp_group = deepspeed_groups._get_expert_data_parallel_group(_name(ep_size))
    singleton = dist.new_group([rank], use_local_synchronization=True)
    return ExpertGroups(ep_size, dist.get_rank(ep_group), ep_group, edp_group, singleton)


def _name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"
