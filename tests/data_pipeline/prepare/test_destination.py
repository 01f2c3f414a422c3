"""Shards that are prepared into a bucket are those of a local folder, killed or not."""

import json
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.prepare import write
from data_pipeline.read.shards import ShardSet
from data_pipeline.store.remote import RemoteOptions
from launcher.prepare import main
from launcher.shards import main as shards
from tests.data_pipeline.clouds import BUCKET, Cloud, cloud_in_memory

URL = f"s3://{BUCKET}/set"
ARGUMENTS = ["--size", "16", "--encoder", "hash", "--codec", "pixel", "--patch-size", "4", "--shard-samples", "3"]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cloud:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return cloud_in_memory(monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        Image.effect_noise((16 + number, 20), 90).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    (folder / "none.png").write_bytes(b"")
    return folder


def prepared(pictures: Path, out: object, *more: str) -> int:
    return main(["--source", str(pictures), "--out", str(out), *ARGUMENTS, *more])


def local(pictures: Path, folder: Path) -> dict[str, bytes]:
    assert prepared(pictures, folder) == 0
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def there(cloud: Cloud) -> dict[str, bytes]:
    return {name: cloud.read(f"set/{name}") for name in cloud.names("set")}


def test_the_same_bytes_appear_in_the_bucket_with_the_index_last(
    pictures: Path, cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = local(pictures, tmp_path / "out")
    capsys.readouterr()
    assert prepared(pictures, URL) == 0
    assert there(cloud) == expected
    written = [name.removeprefix("set/") for kind, name in cloud.calls if kind == "write"]
    assert written.pop(0) == ".probe"
    assert written[0] == "recipe.json"
    assert written[-1] == "index.json"
    tables = [name for name in expected if name.startswith("train-") and name.endswith(".json")]
    assert len(tables) == 4
    assert all(written.index(f"{Path(name).stem}.tar") < written.index(name) for name in tables)
    said = "".join(capsys.readouterr())
    assert f"{URL}: prepared: train 10" in said
    assert str(tmp_path / "temporary") not in said
    assert [path.suffix for path in (tmp_path / "temporary").iterdir()] == [".lock"]
    opened = ShardSet.open(URL, "train", remote=RemoteOptions(cache=tmp_path / "cache"))
    assert opened.num_samples == 10


def test_a_killed_run_goes_on_after_the_shards_that_are_there(
    pictures: Path, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = local(pictures, tmp_path / "out")
    first = write._write_shard
    made: list[str] = []

    def killed(*arguments):
        made.append(arguments[4].name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return first(*arguments)

    monkeypatch.setattr(write, "_write_shard", killed)
    assert prepared(pictures, URL) == 130
    assert "index.json" not in there(cloud)
    assert sum(name.endswith(".tar") for name in there(cloud)) == 2
    capsys.readouterr()
    assert prepared(pictures, URL) == 0
    assert made[3:] == made[2:3] + [
        n for n in sorted(made[3:]) if n not in made[:3]
    ]  # the finished two are not made again
    assert there(cloud) == expected
    before = len(cloud.calls)
    assert prepared(pictures, URL) == 0
    assert "was complete, nothing to do" in capsys.readouterr().out
    assert not [call for call in cloud.calls[before:] if call[0] == "write"]


def test_objects_of_others_are_not_copied(pictures: Path, cloud: Cloud) -> None:
    foreign = ("backup.bin", "notes.json", "other/train-00000.tar")
    for name in foreign:
        cloud.put(f"set/{name}", b"large")
    before = len(cloud.calls)
    assert prepared(pictures, URL) == 0
    assert not [name for _, name in cloud.calls[before:] if name.removeprefix("set/") in foreign]
    assert there(cloud).keys() >= {*foreign, "index.json"}


def test_what_another_rank_has_removed_is_no_error(
    pictures: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = type(cloud.files).rm_file

    def twice(files, path: str) -> None:
        first(files, path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(type(cloud.files), "rm_file", twice)
    assert prepared(pictures, URL, "--dry-run") == 0
    assert prepared(pictures, URL) == 0
    assert not [name for name in there(cloud) if name.startswith(".work")]


def test_another_recipe_is_refused_also_while_both_write(
    pictures: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write._record_recipe

    def raced(folder: Path, *arguments) -> None:
        first(folder, *arguments)
        cloud.put("set/recipe.json", json.dumps({"request": {"image_size": 64}}).encode())

    with monkeypatch.context() as patch:
        patch.setattr(write, "_record_recipe", raced)
        assert prepared(pictures, URL) == 2
    assert f"{URL}: another run prepares other data there" in capsys.readouterr().err
    assert there(cloud).keys() == {"recipe.json"}
    assert prepared(pictures, URL) == 2
    assert f"{URL}: was prepared with" in capsys.readouterr().err


def test_a_bucket_is_tried_in_a_dry_run(
    pictures: Path, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(pictures, URL, "--dry-run") == 0
    assert not there(cloud)
    capsys.readouterr()

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("key=hunter2")

    monkeypatch.setattr(type(cloud.files), "pipe_file", denied)
    assert prepared(pictures, URL, "--dry-run") == 2
    assert (
        capsys.readouterr().err
        == "error: s3://bucket/set/.probe: access denied; check the credentials in the environment\n"
    )


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("https://host/set", "--out takes a folder, or a URL of gs, s3"),
        ("ftp://host/set", "scheme 'ftp' is not allowed"),
        ("s3://", "names no bucket"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_other_urls_are_refused(
    out: str, message: str, dry: bool, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(pictures, out, *(["--dry-run"] if dry else [])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_verify_reads_the_bucket_and_not_what_a_cache_remembers(
    pictures: Path, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for caption in ("number 0", "NUMBER 0"):  # of the same length: the shards differ in their bytes alone
        (pictures / "0.txt").write_text(caption)
        for name in cloud.names("set"):
            cloud.files.rm_file(f"/{BUCKET}/set/{name}")
        assert prepared(pictures, URL) == 0
        assert shards(["verify", URL]) == 0
