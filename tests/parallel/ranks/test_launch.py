"""What a rank without an accelerator may count on."""

import os
import re
import socket
from pathlib import Path

import pytest

from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import GIB, _own_memory, least_memory
from tests.distributed import CONTEXT
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
    ("local_rank", "message"), [(None, "LOCAL_RANK not set with WORLD_SIZE 2"), ("2", "but torch finds 2 CUDA device")]
)
def test_a_rank_without_a_device_is_one_line(
    local_rank: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    for key, value in (STARTED | {"LOCAL_RANK": local_rank}).items():
        monkeypatch.setenv(key, value) if value is not None else monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match=message):
        launch.start()


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
