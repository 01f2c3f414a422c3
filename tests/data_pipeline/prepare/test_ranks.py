import hashlib
import shutil
import time
from pathlib import Path

import pytest

import data_pipeline.prepare.ranks as ranks
from data_pipeline.prepare.ranks import Rank, device_of, heartbeat, pulse, rank_of, wait
from sharpmoe import devices
from sharpmoe.errors import DataError

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        ({**SLURM, "SLURM_STEP_ID": "0"}, Rank(3, 8, 1)),
        (SLURM, Rank(0, 1, 0)),  # a batch script, which no srun has started
        ({**SLURM, "SLURM_STEP_ID": "0", "RANK": "0", "WORLD_SIZE": "2"}, Rank(0, 2, 0)),  # srun torchrun
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, Rank(1, 4, 0)),
        ({"WORLD_SIZE": "4"}, Rank(0, 1, 0)),
    ],
)
def test_every_launcher_is_understood(environment: dict[str, str], rank: Rank) -> None:
    assert rank_of(environment) == rank


def test_ranks_that_cannot_be() -> None:
    with pytest.raises(DataError, match="RANK=4 of WORLD_SIZE=4: no such rank"):
        rank_of({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(DataError, match="RANK=x, WORLD_SIZE=4: expected whole numbers"):
        rank_of({"RANK": "x", "WORLD_SIZE": "4"})


def test_every_piece_belongs_to_one_rank() -> None:
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(1000)]
    owners = [[rank for rank in range(4) if Rank(rank, 4).owns(digest)] for digest in digests]
    assert all(len(found) == 1 for found in owners)
    assert all(200 < owners.count([rank]) < 300 for rank in range(4))


def test_a_device_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "device_count", lambda: 4)
    assert device_of("cpu", Rank(1, 2, 1)) == "cpu"
    assert device_of("cuda", Rank(0, 1, 0)) == "cuda"
    assert device_of("cuda", Rank(5, 8, 1)) == "cuda:1"
    assert device_of("cuda:3", Rank(5, 8, 1)) == "cuda:3"
    monkeypatch.setattr(devices, "device_count", lambda: 1)  # a launcher that shows every process its own device only
    assert device_of("cuda", Rank(5, 8, 1)) == "cuda:0"


def test_waiting_ends_with_the_work_and_with_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_POLL_S", 0.001)
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.05)
    left = iter([5, 4, 4, 3, 0])
    assert wait(lambda: next(left))
    assert not wait(lambda: 1)


def test_a_slow_rank_is_waited_for_and_a_dead_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_POLL_S", 0.01)
    monkeypatch.setattr(ranks, "_BEAT_S", 0.02)
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.3)
    end = time.monotonic() + 1.0
    assert pulse(tmp_path, 0) == -1
    with heartbeat(tmp_path / "work", Rank(0, 2)):
        assert wait(lambda: time.monotonic() < end and (pulse(tmp_path / "work", 0),))
    assert time.monotonic() >= end  # it had no news but the pulse for three times its patience
    assert not wait(lambda: (pulse(tmp_path / "work", 0),))


def test_a_heartbeat_makes_no_folder_anew_and_one_rank_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_BEAT_S", 0.01)
    with heartbeat(tmp_path / "work", Rank(1, 2)):
        shutil.rmtree(tmp_path / "work")
        time.sleep(0.05)
    with heartbeat(tmp_path / "work", Rank()):
        pass
    assert not (tmp_path / "work").exists()
