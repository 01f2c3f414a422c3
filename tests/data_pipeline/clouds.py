"""A cloud in memory: a file system of fsspec that stands for s3:// and gs://."""

from typing import ClassVar

import pytest

BUCKET = "bucket"


class Cloud:
    """What is in the cloud, and what was asked of it."""

    def __init__(self, files) -> None:
        self.files = files

    def put(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"/{BUCKET}/{name}", content)

    def names(self, folder: str) -> set[str]:
        return {path.removeprefix(f"/{BUCKET}/{folder}/") for path in self.files.find(f"/{BUCKET}/{folder}")}

    def read(self, name: str) -> bytes:
        return self.files.cat_file(f"/{BUCKET}/{name}")

    @property
    def calls(self) -> list[tuple[str, str]]:
        return type(self.files).calls


def cloud_in_memory(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Let s3:// and gs:// be a cloud in memory."""
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem

    class Files(memory):
        cachable = False
        store: ClassVar[dict[str, object]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        calls: ClassVar[list[tuple[str, str]]] = []

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            type(self).calls.append(("read", path.partition(f"{BUCKET}/")[2]))
            return super().cat_file(path, start, end)

        def put_file(self, lpath: str, rpath: str, **_: object) -> None:
            type(self).calls.append(("write", rpath.partition(f"{BUCKET}/")[2]))
            with open(lpath, "rb") as file:
                super().pipe_file(rpath, file.read())

        def pipe_file(self, path: str, value: bytes, **_: object) -> None:
            type(self).calls.append(("write", path.partition(f"{BUCKET}/")[2]))
            super().pipe_file(path, value)

    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: {"s3": Files, "gs": Files}[name]())
    return Cloud(Files())
