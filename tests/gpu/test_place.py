"""The processes in which tests of several devices run, tried on the CPU: they are not forks."""

import pytest
import torch

from sharpmoe.parallel.ranks.launch import World, sum_over_ranks
from tests.gpu.place import spawned


def doubled(world: World, value: float) -> tuple[int, str, float]:
    total = sum_over_ranks(torch.tensor(value, dtype=torch.float64), world)
    if value < 0:
        raise ValueError("a mistake")
    return world.rank, world.device.type, float(total)


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_in_new_processes() -> None:
    assert spawned("cpu", doubled, 2, 1.5) == [(0, "cpu", 3.0), (1, "cpu", 3.0)]
    with pytest.raises(ValueError, match="a mistake"):
        spawned("cpu", doubled, 1, -1.0)
