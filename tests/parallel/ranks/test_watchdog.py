"""Lost ranks: found by whatever they have become, named by all survivors; a clean end is never disturbed."""

import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from sharpmoe.config import PeersConfig
from sharpmoe.parallel.ranks import watchdog
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.ranks.watchdog import _FAILED, _HERE, _LEFT, _Beat, _Judge
from tests.distributed import start_ranks

CONFIG = PeersConfig(dead_after=10, stuck_after=100)


def beat(pulse: int, marks: int = 1, state: str = _HERE) -> _Beat:
    return _Beat(pulse, marks, "step 7", state, "node, process 12")


def judge_of(*beats: _Beat, judges_all: bool = True) -> _Judge:
    judge = _Judge(CONFIG, 0.0, judges_all)
    judge.hear(dict(enumerate(beats)), 0.0)
    return judge


def test_a_silent_rank_is_named_after_its_time() -> None:
    judge = judge_of(beat(1), beat(1), beat(1))
    judge.hear({0: beat(2), 1: beat(1), 2: beat(2)}, 9.9)
    assert judge.verdict(9.9) == ""
    assert (
        judge.verdict(10.1) == "rank 1 (node, process 12, last seen in step 7): no heartbeat for 10 s, dead or stopped"
    )


def test_a_rank_that_left_is_not_missed() -> None:
    judge = judge_of(beat(1), beat(1, state=_LEFT))
    judge.hear({0: beat(2)}, 50)
    assert judge.verdict(55) == ""


def test_a_failed_rank_is_named_where_others_go_on() -> None:
    judge = judge_of(beat(1), beat(1, state=_FAILED))
    assert judge.verdict(4) == ""
    judge.hear({0: beat(2)}, 5.5)
    assert "rank 1 (node, process 12, last seen in step 7): ended with an error" in judge.verdict(5.5)
    judge.hear({0: beat(3, state=_FAILED)}, 5.6)  # all failed alike: nobody is lost
    assert judge.verdict(6) == ""


def test_the_rank_furthest_behind_is_stuck() -> None:
    judge = judge_of(beat(1, 5), beat(1, 4), beat(1, 5))
    judge.hear({0: beat(2, 5), 1: beat(2, 4), 2: beat(2, 5)}, 101)
    assert judge.verdict(101).startswith("rank 1 (node, process 12, last seen in step 7): stuck")
    judge.hear({1: beat(3, 5)}, 102)
    assert judge.verdict(103) == ""
    judge.hear({0: beat(3, 5), 1: beat(4, 5), 2: beat(3, 5)}, 203)
    assert "all at the same place (step 7)" in judge.verdict(203)


def test_only_rank_0_knows_who_is_stuck() -> None:
    judge = judge_of(beat(1, 5), beat(1, 4), judges_all=False)
    judge.hear({0: beat(2, 5), 1: beat(2, 4)}, 101)
    assert judge.verdict(101) == ""


def test_a_process_that_was_stopped_itself_judges_nobody() -> None:
    judge = judge_of(beat(1), beat(1))
    judge.restart_clocks(1000)
    assert judge.verdict(1009) == ""


class Case(NamedTuple):
    victim: int
    fault: str
    named: str  # what survivors say


CASES = {
    "killed": Case(1, "kill", r"rank 1 \(.* step \d\): no heartbeat"),
    "killed with the store": Case(0, "kill", r"rank 0 \(.* step \d\).*: no (heartbeat|answer)"),
    "stopped": Case(2, "stop", r"rank 2 \(.* step \d\): no heartbeat"),
    "stopped with the store": Case(0, "stop", r"rank 0 \(.* step \d\).*: no (heartbeat|answer)"),
    "stuck": Case(1, "stuck", r"rank 1 \(.* step \d\): stuck"),
    "raised": Case(2, "raise", r"rank 2 \(.* step \d\): ended with an error"),
}
DEAD_AFTER, STUCK_AFTER = 3.0, 4.0


def work(world: World, folder: Path, case: Case) -> None:
    """Steps of one all-reduce each; in the fifth one rank meets its fault."""
    error = os.open(folder / f"err{world.rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(error, 2)
    with watchdog.watching(world.rank, world.size, PeersConfig(dead_after=DEAD_AFTER, stuck_after=STUCK_AFTER)):
        for step in range(1, 1000):
            watchdog.mark(f"step {step}")
            time.sleep(0.2)  # beats go by
            if step == 5 and world.rank == case.victim:
                (folder / "began").write_text(str(time.time()))
                meet(case.fault)
            watchdog.mark()
            dist.all_reduce(torch.zeros(1))


def meet(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "stuck":
        time.sleep(60)
    raise ValueError("a mistake")


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_survivors_end_in_time_and_name_the_lost_rank(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with start_ranks(work, 3, tmp_path, case) as ranks:
        survivors = [process for rank, process in enumerate(ranks) if rank != case.victim]
        for process in survivors:
            process.join(60)
        ended = time.time()
        assert [process.exitcode for process in survivors] == [watchdog.LOST] * 2
    allowed = {"stuck": STUCK_AFTER, "raise": DEAD_AFTER}.get(case.fault, DEAD_AFTER) + 2
    took = ended - float((tmp_path / "began").read_text())
    print(f"{name}: {took:.2f} s of {allowed:g} s")
    assert took < allowed + 8  # a busy machine
    for rank in {0, 1, 2} - {case.victim}:
        lines = (tmp_path / f"err{rank}").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("error: ")]
        assert re.match(f"error: rank {rank}: {case.named}", line), line


def leave_apart(world: World, folder: Path) -> None:
    with watchdog.watching(world.rank, world.size, PeersConfig(dead_after=0.5)):
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.7 * world.rank)
    (folder / f"left{world.rank}").touch()


@pytest.mark.dist
def test_a_clean_end_is_not_disturbed(tmp_path: Path) -> None:
    with start_ranks(leave_apart, 3, tmp_path) as ranks:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"left0", "left1", "left2"}
