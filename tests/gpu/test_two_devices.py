"""Two ranks: the exchange of rows between experts, and what becomes of a rank whose peer is killed."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharpmoe.config import PeersConfig
from sharpmoe.devices import device_count
from sharpmoe.parallel.ranks import watchdog
from sharpmoe.parallel.ranks.launch import World
from tests.gpu.place import run_fresh, start_fresh
from tests.parallel.dispatching import CASES
from tests.parallel.experts.test_dispatch import TOLERANCE, compare

two_devices = [pytest.mark.gpu, pytest.mark.skipif(device_count() == 1, reason="needs two CUDA devices")]
DEAD_AFTER = 3.0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=two_devices)])
def test_rows_travel_over_nccl(device: str) -> None:
    """Both dispatchers; uneven and empty parts, a rank without tokens. On the CPU: tests/parallel/experts."""
    for errors in run_fresh(device, compare, 2):
        for key, worst in errors.items():
            assert max(worst) < TOLERANCE[CASES[key[-1]].dtype], (key, worst)


def work(world: World, folder: Path) -> None:
    """Steps of one all-reduce; in the fifth rank 1 kills itself, and rank 0 waits in the collective."""
    error = os.open(folder / f"err{world.rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    with watchdog.watching(world.rank, world.size, PeersConfig(dead_after=DEAD_AFTER, stuck_after=60)):
        for step in range(1, 1000):
            watchdog.mark(f"step {step}")
            time.sleep(0.2)
            if step == 5 and world.rank == 1:
                (folder / "began").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            watchdog.mark()
            total = torch.ones(1, device=world.device)
            dist.all_reduce(total)
            total.item()  # waits for the device


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_devices)])
def test_a_rank_whose_peer_is_killed_ends_and_names_it(device: str, tmp_path: Path) -> None:
    with start_fresh(device, work, 2, tmp_path) as (survivor, _):
        survivor.join(90)
        ended = time.time()
        assert survivor.exitcode == watchdog.LOST
    assert ended - float((tmp_path / "began").read_text()) < DEAD_AFTER + 10
    lines = (tmp_path / "err0").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert re.match(r"error: rank 0: rank 1 \(.* step 5\): no heartbeat", line), line
