import os
import pickle
from pathlib import Path

import pytest

from data_pipeline.store.remote import RemoteOptions
from data_pipeline.store.store import open_store
from sharpmoe.errors import DamageError
from tests.data_pipeline.range_server import RangeServer
from tests.data_pipeline.store.behaviour import SIZE, check_reads, check_refusals


def test_a_folder(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "set=/etc")  # what webdataset would obey
    store = open_store(folder)
    check_reads(store, folder)
    check_reads(pickle.loads(pickle.dumps(store)), folder)
    check_refusals(store)


def test_a_folder_of_more_files_than_may_be_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = open_store(str(folder))
    for number in range(300):
        (folder / f"{number}.tar").write_bytes(str(number).encode())
    for number in (*range(300), 0):
        assert store.read(f"{number}.tar", 0, 1) == str(number)[:1].encode()
    assert len(os.listdir("/proc/self/fd")) <= before + 130
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_cut_under_our_feet_is_an_error(folder: Path) -> None:
    store = open_store(folder)
    store.read("a.tar", 0, SIZE)
    os.truncate(folder / "a.tar", 100)
    with pytest.raises(DamageError, match="before a sample does"):
        store.read("a.tar", 50, 100)


@pytest.mark.parametrize("kind", ["folder", "http"])
def test_a_store_survives_a_fork(kind: str, folder: Path, server: RangeServer, options: RemoteOptions) -> None:
    store = open_store(folder if kind == "folder" else server.url, options)
    check_reads(store, folder, 3)
    child = os.fork()
    if child == 0:
        try:
            check_reads(store, folder, 5)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    check_reads(store, folder, 3)
