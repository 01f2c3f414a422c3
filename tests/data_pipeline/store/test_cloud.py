import importlib.util
import pickle
from pathlib import Path
from typing import ClassVar

import pytest

from data_pipeline.store.remote import RemoteOptions
from data_pipeline.store.store import open_store
from sharpmoe.errors import DataError
from tests.data_pipeline.store.behaviour import check_reads, check_refusals


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_clouds(scheme: str, folder: Path, options: RemoteOptions, monkeypatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    calls: list[str] = []

    class Flaky(memory):
        protocol = scheme
        cachable = False
        store: ClassVar[dict[str, object]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            calls.append(path)
            if len(calls) % 2:
                raise OSError("slow down, key=hunter2")
            return super().cat_file(path, start, end)

    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: {scheme: Flaky}[name]())
    for name in ("a.tar", "index.json"):
        Flaky().pipe_file(f"/bucket/p/{name}", (folder / name).read_bytes())
    store = open_store(f"{scheme}://bucket/p/", options)
    check_reads(store, folder)
    check_reads(pickle.loads(pickle.dumps(store)), folder)
    check_refusals(store)
    monkeypatch.setattr(Flaky, "cat_file", lambda *_, **__: (_ for _ in ()).throw(OSError("key=hunter2")))
    with pytest.raises(DataError, match=r"request failed \(OSError\) \(4 tries\)"):
        store.read("a.tar", 0, 10, fresh=True)
    monkeypatch.setattr(Flaky, "cat_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("key=hunter2")))
    with pytest.raises(DataError, match="access denied; check the credentials"):
        store.read("a.tar", 0, 10, fresh=True)


def test_clouds_without_their_driver_or_with_keys_in_the_url(options: RemoteOptions) -> None:
    with pytest.raises(DataError, match="no user, password or query in the URL") as raised:
        open_store("s3://key:hunter2@bucket", options)
    assert "hunter2" not in str(raised.value)
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(DataError, match="needs fsspec and gcsfs; pip install gcsfs"):
            open_store("gs://bucket", options)
