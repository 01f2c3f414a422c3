"""The counter of collectives, against calls whose bytes are known."""

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm

from sharpmoe.parallel.ranks.launch import World
from tests.counting import Collective, CollectiveCounter
from tests.distributed import run_ranks

KIB = 1024


def talk(world: World) -> list[Collective]:
    """Messages of one KiB per rank, through torch and through DeepSpeed."""
    part, whole = torch.ones(256), torch.ones(512)
    alone = dist.new_group([world.rank], use_local_synchronization=True)
    mine = (192, 64)[world.rank]
    with CollectiveCounter() as counter:
        dist.all_reduce(part)
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather(list(whole.chunk(2)), part)
        dist.reduce_scatter_tensor(part, whole)
        comm.all_gather_into_tensor(whole, part)
        comm.reduce_scatter_tensor(part, whole)
        comm.broadcast(part, 0)
        dist.all_to_all_single(torch.empty(256), part)
        dist.all_to_all_single(torch.empty(2 * mine), part, [mine, mine], [192, 64])
        dist.barrier()
        dist.all_reduce(part, group=alone)
    return counter.calls


@pytest.mark.dist
def test_bytes_that_leave_a_rank() -> None:
    first, second = run_ranks(talk, 2)
    common = [
        Collective("all_reduce", 2, KIB, KIB),
        Collective("all_gather", 2, 2 * KIB, KIB),
        Collective("all_gather", 2, 2 * KIB, KIB),
        Collective("reduce_scatter", 2, 2 * KIB, KIB),
        Collective("all_gather", 2, 2 * KIB, KIB),
        Collective("reduce_scatter", 2, 2 * KIB, KIB),
    ]
    last = [Collective("barrier", 2, 0, 0), Collective("all_reduce", 1, KIB, 0)]
    half = Collective("all_to_all", 2, KIB, KIB // 2)
    sends = (Collective("broadcast", 2, KIB, KIB), half, Collective("all_to_all", 2, KIB, 64 * 4))
    takes = (Collective("broadcast", 2, KIB, 0), half, Collective("all_to_all", 2, KIB, 192 * 4))
    assert first == [*common, *sends, *last]
    assert second == [*common, *takes, *last]
