"""A data process of one rank is killed in a run of two: every rank ends soon, one line says why, nothing is left."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sharpmoe.config_io import dump_run_config
from sharpmoe.log_file import read_log
from tests.fixtures_data import make_shards
from tests.launcher.ranks import ranks_of
from tests.train.setting import make_run


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_data_process_ends_all_ranks_within_ten_seconds(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    data, train = {"num_workers": 2}, {"steps": 100_000}
    run = make_run(shards, tmp_path, stage="pretrain", data=data, train=train, log={"every": 5})
    (tmp_path / "run.yaml").write_text(dump_run_config(run))
    words = ["launcher/train.py", "--deepspeed", "configs/zero3.json", "--config", str(tmp_path / "run.yaml")]
    log = tmp_path / "run" / "log.jsonl"
    with ranks_of(words, 2, tmp_path) as ranks:
        wait_for(lambda: log.is_file() and bool(read_log(log).get("loss/total")), 120)
        family = [child for rank in ranks for child in psutil.Process(rank.pid).children(recursive=True)]
        victim = next(child for child in psutil.Process(ranks[1].pid).children() if child.status() != "zombie")
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert [rank.wait(10) for rank in ranks] == [2, 2]
        assert time.monotonic() - began < 10
    wait_for(lambda: not [child for child in family if child.is_running() and child.status() != "zombie"], 10)
    error = (tmp_path / "err0").read_text()
    assert error.count("\n") == 1
    assert error.startswith(f"error: rank 1: data: reader process (pid {victim.pid}) is killed by signal: Killed")
    assert (tmp_path / "err1").read_text() == ""
