from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.store import remote
from data_pipeline.store.remote import RemoteOptions
from tests.data_pipeline.range_server import RangeServer, serving
from tests.data_pipeline.store.behaviour import SIZE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 1 << 12)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.tar").write_bytes(np.random.default_rng(0).bytes(SIZE))
    (folder / "index.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[RangeServer]:
    with serving(folder) as running:
        yield running


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(cache=tmp_path / "cache", cache_bytes=1 << 20, timeout_s=0.4, retries=3, pause_s=0.01)
