import os
from pathlib import Path

import pytest

from data_pipeline.store.cache import BlockCache
from data_pipeline.store.remote import RemoteOptions
from data_pipeline.store.store import open_store
from sharpmoe.errors import DataError


def test_the_cache_is_bounded_and_keeps_what_is_used(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, limit=80_000, block=10_000)
    other = BlockCache(tmp_path, limit=80_000, block=10_000)  # another process sees the same folder
    (tmp_path / "dead.1-x.part").write_bytes(bytes(9_000))
    os.utime(tmp_path / "dead.1-x.part", (0, 0))
    for number in range(100):
        (cache, other)[number % 2].write(str(number), bytes([number]) * 10_000)
        assert cache.read("0", 3, 5) == b"\0\0"
        os.utime(cache._path("0"))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 80_000 + 10
    assert cache.read("99", 0, 10_000) == bytes([99]) * 10_000
    assert cache.read("1", 0, 10) is None
    assert not list(tmp_path.glob("*.part"))


def test_a_cache_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 32768 or more"):
        open_store("http://h", RemoteOptions(cache=tmp_path, cache_bytes=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used as a cache"):
        open_store("http://h", RemoteOptions(cache=tmp_path / "file"))
