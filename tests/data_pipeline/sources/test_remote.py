"""Sources at a URL hold what the same files hold on the disk."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.sources import remote
from data_pipeline.sources.items import source_identity
from data_pipeline.sources.open import SourceOptions, open_source
from launcher.prepare import main
from sharpmoe.errors import DataError
from tests.data_pipeline.clouds import BUCKET, Cloud, cloud_in_memory
from tests.data_pipeline.range_server import serving
from tests.data_pipeline.sources.test_images import encoded
from tests.fixtures_data import listing

PNG = encoded(Image.effect_noise((20, 20), 90))


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cloud:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return cloud_in_memory(monkeypatch)


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number} é.png").write_bytes(PNG + bytes(number))
        (folder / f"{number} é.txt").write_text(f"number {number}")
    (folder / "...png").write_bytes(PNG)
    (folder / "...txt").write_text("dots")
    (folder / "notes.rtf").write_text("x")
    return folder


def split_pictures(folder: Path) -> Path:
    for name in ("train/a", "val/b"):
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.png").write_bytes(PNG)
        (folder / f"{name}.txt").write_text("noise")
    return folder


def split_table(folder: Path) -> Path:
    for name in ("train/a", "val/b"):
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.png").write_bytes(PNG)
    (folder / "captions.csv").write_text("file,caption\ntrain/a.png,noise\nval/b.png,noise\n")
    return folder


def table(folder: Path) -> Path:
    folder.mkdir()
    (folder / "deep").mkdir()
    (folder / "deep" / "a.png").write_bytes(PNG)
    (folder / "captions.csv").write_text("file,caption\ndeep/a.png,noise\n")
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(folder / name, "w") as archive:
            for member, content in (("0.png", PNG), ("0.txt", b"noise"), ("1.png", PNG), ("1.cls", b"3")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return folder


def parquet(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    images = [{"bytes": PNG, "path": "a.png"}] * 3
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.table({"image": images, "text": ["a", "b", "c"]}), folder / "train.parquet"
    )
    return folder


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("make", [pictures, split_pictures, split_table, table, tars, parquet])
def test_a_source_in_the_cloud_is_that_of_the_disk(make, scheme: str, cloud: Cloud, tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    for path in folder.rglob("*"):
        if path.is_file():
            cloud.put(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    here = open_source(SourceOptions(source=str(folder)))
    there = open_source(SourceOptions(source=f"{scheme}://{BUCKET}/set/"))
    assert listing(there) == listing(here)
    if make in (split_pictures, split_table):
        assert [(item.name, item.split) for item in listing(there).items] == [
            ("train/a.png", "train"),
            ("val/b.png", "unseen"),
        ]
    assert source_identity(there, there.units()) == source_identity(here, here.units())
    if make is not parquet:  # its images are copied to a temporary file at the first reading
        assert not any(name.endswith(".png") for _, name in cloud.calls if _ == "read")
    for item in listing(here).items:
        assert there.read(item) == here.read(item)
        assert there.read(item, 10) == here.read(item)[:10]


def test_what_a_disk_cannot_name_is_left_out(cloud: Cloud) -> None:
    for name in ("a.png", "a.txt", "a.png/b.png", f"{'x' * 300}.png", "..hidden/../../up.png"):
        cloud.files.store[f"/{BUCKET}/set/{name}"] = type(cloud.files.open("/f", "wb"))(cloud.files, "/f", PNG)
    cloud.put("set/a.txt", b"noise")
    cloud.files.find = None
    type(cloud.files).find = lambda self, path, detail: {
        name: {"type": "file", "size": len(file.getvalue())} for name, file in self.store.items() if path in name
    }
    found = listing(open_source(SourceOptions(source=f"s3://{BUCKET}/set")))
    assert [item.name for item in found.items] == ["a.png"]
    assert sorted(entry.reason for entry in found.skipped) == [
        "its name cannot be that of a file (File exists)",
        "its name cannot be that of a file (File name too long)",
        "its name is not a plain relative path",
    ]


def test_a_table_in_the_cloud_names_no_file_of_this_machine(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    cloud.put("set/captions.csv", f"file,caption\na.png,a\n{tmp_path}/secret.png,b\n../../../secret.png,c\n".encode())
    cloud.put("set/a.png", PNG)
    found = listing(open_source(SourceOptions(source=f"s3://{BUCKET}/set")))
    assert [item.name for item in found.items] == ["a.png"]
    assert len(found.skipped) == 2
    assert "outside of s3://bucket/set" in found.skipped[0].reason


def test_errors_name_the_url_and_not_the_stand_in(cloud: Cloud, tmp_path: Path) -> None:
    cloud.put("set/captions.csv", b"x,y\n")
    with pytest.raises(DataError, match=r"^s3://bucket/set/captions.csv: columns x, y"):
        listing(open_source(SourceOptions(source=f"s3://{BUCKET}/set")))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/none", "s3://bucket/none: there is nothing of this name"),
        ("s3://bucket/none.tar", "does not exist"),
        ("s3://bucket/set/none.csv", "there is nothing of this name"),
        ("s3://", "s3://: names no bucket"),
        ("gs:///x", "gs://: names no bucket"),
        ("ftp://host/x", "scheme 'ftp' is not allowed"),
        ("s3://key:hunter2@bucket/x", "no user, password or query"),
        ("https://user:hunter2@host/set", "has no listing of files; expected the URL of one .tar"),
        ("s3://${NOT_SET_ANYWHERE}/x", "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_of_a_dry_run(
    url: str, message: str, cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.put("set/a.png", PNG)
    assert main(["--source", url, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "hunter2" not in error
    assert not (tmp_path / "out").exists()


def test_a_tar_at_http_is_read_by_ranges(tmp_path: Path) -> None:
    folder = tars(tmp_path / "set")
    with serving(tmp_path) as server:
        there = open_source(SourceOptions(source=f"{server.url}/set/a.tar?token=1"))
        here = open_source(SourceOptions(source=str(folder / "a.tar")))
        assert listing(there) == listing(here)
        assert [there.read(item) for item in listing(here).items] == [PNG] * 2
        assert all("Range" in request.headers and "token=1" in request.path for request in server.seen)


def test_stand_ins_of_killed_processes_are_removed(cloud: Cloud, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    prefix = f"sharpmoe-source-{remote.socket.gethostname()}-"
    for process in (ended.pid, os.getppid()):
        (tmp_path / "temporary" / f"{prefix}{process}-x").mkdir()
    cloud.put("set/a.png", PNG)
    cloud.put("set/a.txt", b"a")
    open_source(SourceOptions(source=f"s3://{BUCKET}/set"))
    left = sorted(path.name.removeprefix(prefix).partition("-")[0] for path in (tmp_path / "temporary").iterdir())
    assert left == sorted([str(os.getpid()), str(os.getppid())])
