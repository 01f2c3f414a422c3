"""What a rank without an accelerator may count on."""

import os
from pathlib import Path

import pytest

from sharpmoe.parallel.ranks import launch
from sharpmoe.parallel.ranks.launch import GIB, _own_memory, least_memory
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
