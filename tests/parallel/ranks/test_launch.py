"""What a rank without an accelerator may count on."""

import argparse
import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launcher.command import Command
from sharpmoe import devices
from sharpmoe.config import COLLECTIVE_SECONDS
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import GIB, World, _own_memory, least_memory
from tests.distributed import CONTEXT, run_ranks, start_ranks
from tests.train.setting import ALONE


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host of 64 GiB that a launcher has told nothing; the file that limits a container."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_MEMORY_LIMIT", tmp_path / "memory.max")
    return tmp_path / "memory.max"


def test_ranks_share_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _own_memory(ALONE) == least_memory(ALONE) == 64
    assert _own_memory(ALONE._replace(size=4)) == 16  # nobody says that there are other hosts
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert _own_memory(ALONE._replace(size=4)) == 32


@pytest.mark.parametrize(("limit", "gib"), [("max\n", 64), (f"{8 * GIB}\n", 8), (f"{100 * GIB}\n", 64)])
def test_a_container_has_what_it_is_given(limit: str, gib: int, host: Path) -> None:
    host.write_text(limit)
    assert _own_memory(ALONE) == gib


STARTED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "RANK not set beside"),
        ({"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "RANK, MASTER_ADDR, MASTER_PORT not set beside"),
        ({"RANK": "x"}, "RANK is 'x', expected a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', expected a whole number"),
        ({"RANK": "2"}, "RANK is 2, expected 0 to 1 with WORLD_SIZE 2"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (STARTED | changes).items():
        monkeypatch.setenv(key, value) if value is not None else monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        launch.start()
    assert "start with deepspeed or torchrun" in str(caught.value)
    assert launch.is_main()  # the error is printed


@pytest.mark.parametrize(
    ("environment", "count", "index"),
    [
        ({"RANK": "3", "LOCAL_RANK": "3"}, 4, 3),
        ({"RANK": "3", "LOCAL_RANK": "3"}, 1, 0),  # one visible device per task
        ({"RANK": "5", "LOCAL_RANK": None}, 4, 1),  # machines are filled one after the other
        ({"RANK": "5", "LOCAL_RANK": None, "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}, 4, 2),
        ({"RANK": "5", "LOCAL_RANK": None, "SLURM_LOCALID": "2"}, 4, 1),  # of the batch script, not of this process
        ({"RANK": "5", "LOCAL_RANK": None, "OMPI_COMM_WORLD_LOCAL_RANK": "6"}, 4, 2),
    ],
)
def test_a_rank_finds_its_device_and_tells_deepspeed(
    environment: dict[str, str | None], count: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "device_count", lambda: count)
    for name in ("SLURM_LOCALID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for key, value in (STARTED | {"WORLD_SIZE": "8"} | environment).items():
        monkeypatch.setenv(key, value) if value is not None else monkeypatch.delenv(key, raising=False)
    called: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(launch, "_start_group", lambda *given: called.append(given))
    monkeypatch.setattr(launch, "device_identity", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(launch, "_check_devices_differ", lambda *given: called.append(given))
    monkeypatch.setattr(launch.deepspeed, "init_distributed", lambda **_: None)
    rank, device = int(environment["RANK"] or ""), torch.device("cuda", index)
    assert launch.start().device == device
    assert called == [device, ("nccl", rank, 8), (f"GPU {index}", rank, 8)]
    assert os.environ["LOCAL_RANK"] == str(index)  # what DeepSpeed's engine passes to set_device
    assert os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(index)) == str(index)


def identify(world: World, names: list[str]) -> str:
    """Return what the check says to this rank, where it knows that it says so to all."""
    try:
        launch._check_devices_differ(names[world.rank], world.rank, world.size)
    except ConfigError as error:
        return str(error) if error.agreed else "not agreed"
    return ""


@pytest.mark.dist
def test_two_ranks_with_one_device_are_an_error_on_all() -> None:
    assert run_ranks(identify, 3, ["GPU a", "GPU b", "GPU c"]) == ["", "", ""]
    first, *others = run_ranks(identify, 3, ["GPU a", "GPU b", "GPU a"])
    assert re.match(r"environment: ranks 0 and 2 have the same CUDA device \(.*: GPU a\); start one rank per", first)
    assert others == [first, first]


def time_outs(world: World) -> list[float]:
    """Seconds after which collectives give up: of the first group, of one after it, and of one under NCCL."""
    groups = [dist.group.WORLD, dist.new_group(list(range(world.size)))]
    alone = dist.new_group([world.rank], use_local_synchronization=True)
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in (*groups, alone) if group]
    found.append(distributed_c10d._get_default_timeout(dist.Backend("nccl")))
    return [each.total_seconds() for each in found]


@pytest.mark.dist
def test_every_group_gives_up_when_the_configuration_says() -> None:
    assert run_ranks(time_outs, 2) == [[COLLECTIVE_SECONDS] * 4] * 2


def test_a_stopped_process_has_the_time_outs_of_torch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = (distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout)
    launch._start_group("gloo", 0, 1)
    assert distributed_c10d.default_pg_timeout.total_seconds() == COLLECTIVE_SECONDS
    launch.stop()
    assert (distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout) == before


def fail_beside_a_collective(world: World, folder: Path) -> None:
    """As a command: rank 1 makes a mistake while rank 0 sits in a collective. NCCL would not destroy a group then."""
    dist.destroy_process_group = lambda *_: time.sleep(1000)  # type: ignore[assignment]

    def act(_: argparse.Namespace) -> None:
        dist.barrier()
        if world.rank == 1:
            time.sleep(0.5)  # rank 0 is inside
            (folder / "failed").touch()
            raise ValueError("a mistake")
        dist.all_reduce(torch.zeros(1))

    command = Command(text="", arguments=lambda _: None, act=act, cleanup=launch.stop, leave=launch.leave)
    command.leave(command([]))


@pytest.mark.dist
def test_a_rank_that_fails_leaves_at_once(tmp_path: Path) -> None:
    with start_ranks(fail_beside_a_collective, 2, tmp_path) as ranks:
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [2, 1]  # a lost connection, and a bug
    assert (tmp_path / "failed").exists()


def test_only_rank_0_of_a_sound_start_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert launch.is_main() is prints


def test_every_rank_that_is_alone_to_know_prints_why_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": None, "MASTER_PORT": None}.items():
        monkeypatch.setenv(key, value) if value is not None else monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT not set beside RANK=3, WORLD_SIZE=8;") as caught:
        launch.start()
    assert caught.value.lone
    assert not ConfigError("in words, which every rank has").lone


def start_at(port: int) -> str:
    """Start in this process, which no test has used before: one that has a group does not open a port."""
    os.environ.update(STARTED | {"MASTER_PORT": str(port)})
    with pytest.raises(ConfigError) as caught:
        launch.start()
    return str(caught.value)


@pytest.mark.slow  # starts a process
def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a pool asks for more of the host than the fixture knows
    with socket.socket() as other, CONTEXT.Pool(1) as fresh:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = fresh.apply(start_at, (port,))
    assert re.search(f"port {port} is taken.*--master_port {port + 1}`", said)
