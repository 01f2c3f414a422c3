"""Looking after shards: what is damaged is found, what is merged can be read, what is shown is there."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.index import index_bytes, parse_index
from data_pipeline.read.mixture import Mixture
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.stream import stream
from launcher.prepare import main as prepare
from launcher.shards import main
from tests.fixtures_data import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sides = ((1, 1), (1, 4))
    return make_shards(tmp_path_factory.mktemp("data") / "d", 30, buckets="32x32,16x56", sides=sides, captions=2)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    return to


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]], str]:
    code = main(["verify", str(folder), "--quiet", "--json"])
    *found, shown = capsys.readouterr().out.splitlines()
    return code, [json.loads(line) for line in found], shown


def test_sound_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, shown = verify(folder, capsys)
    assert (code, found) == (0, [])
    assert "30 samples" in shown
    assert shown.endswith("all sound")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0"), (2, "2, see skipped.jsonl"), (1000, "1000 or more, see skipped")]
)
def test_stats_say_how_much_was_left_out(
    count: int, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copy(folder, tmp_path / "d") / "index.json"
    index = replace(parse_index(place.read_bytes(), ""), skipped=[("*.md", "2 files")] * count)
    place.write_bytes(index_bytes(index))
    assert main(["stats", str(place.parent)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  left out"))
    assert line.startswith(f"  left out   {said}")
    assert "pictures" not in line, "kinds of other files are among them"


def test_verify_names_the_sample(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hurt = copy(folder, tmp_path / "d")
    table = sorted(hurt.glob("train-*.json"))[0]
    key, places = json.loads(table.read_text())["samples"][2]
    tar = table.with_suffix(".tar")
    content = bytearray(tar.read_bytes())
    content[places["text1.npy"][0] + 130] ^= 1  # a caption that a run may never draw
    tar.write_bytes(content)
    code, found, shown = verify(hurt, capsys)
    assert code == 1
    assert [(Path(one["shard"]).name, one["key"], one["what"]) for one in found] == [
        (tar.name, "", "sha256 differs from the index"),
        (tar.name, key, "text1.npy: checksum differs from the index, the shard is damaged"),
    ]
    assert shown.endswith("1 samples damaged")


@pytest.mark.parametrize("gone", [".tar", ".json"])
def test_verify_counts_what_a_lost_file_costs(
    gone: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hurt = copy(folder, tmp_path / "d")
    table = sorted(hurt.glob("train-*.json"))[0]
    count = len(json.loads(table.read_text())["samples"])
    table.with_suffix(gone).unlink()
    (hurt / "empty_text.npz").write_bytes(b"x")
    code, found, shown = verify(hurt, capsys)
    assert code == 1
    assert {Path(one["shard"]).name for one in found} == {f"{table.stem}.tar", "empty_text.npz"}
    assert shown.endswith(f"{count} samples damaged")


def test_stats_tell_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(folder), "--samples", "8"]) == 0
    shown = capsys.readouterr().out
    for part in ("30 in ", "train 25, unseen 5", "32x32", "16 x 56", "train: statistics of 8 samples", "4 classes"):
        assert part in shown


def test_show_draws_pictures_of_every_bucket(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheets" / "contact.png"
    assert main(["show", str(folder), "--count", "6", "--split", "train", "--out", str(out)]) == 0
    pixels = np.asarray(Image.open(out))
    assert pixels.shape[2] == 3
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # pictures and heat, not an empty sheet


@pytest.mark.parametrize("link", [False, True])
def test_merged_folders_hold_the_samples_of_both(
    link: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, kept in zip(parts, ("train", "unseen"), strict=True):
        _only(copy(folder, part), kept)
    arguments = ["merge", str(tmp_path / "m"), *map(str, parts), "--quiet"] + ["--link"] * link
    assert main(arguments) == 0
    assert "train 25, unseen 5" in capsys.readouterr().out
    assert verify(tmp_path / "m", capsys)[0] == 0
    for split in ("train", "unseen"):
        ours, theirs = (ShardSet.open(place, split) for place in (tmp_path / "m", folder))
        for bucket in theirs.buckets:
            a, b = (shards.batch(shards.indices_of(bucket)) for shards in (ours, theirs))
            assert sorted(a.keys) == sorted(b.keys)
    assert main(arguments) == 2
    assert "already holds prepared shards" in capsys.readouterr().err


def test_folders_of_other_buckets_are_merged_and_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"a": ("--size", "32"), "b": ("--buckets", "32", "--bucket-step", "8", "--codec-from", str(tmp_path / "a"))}
    for name, words in sets.items():
        folder = tmp_path / f"set-{name}"
        folder.mkdir()
        for number, (height, width) in enumerate(((40, 40), (40, 60), (60, 40)) * 12):
            Image.effect_noise((width, height), 60).convert("RGB").save(folder / f"{name}{number}.png")
            (folder / f"{name}{number}.txt").write_text("noise")
        common = ("--source", str(folder), "--out", str(tmp_path / name), "--encoder", "hash", "--shard-samples", "8")
        assert prepare([*common, *words]) == 0
    places = [str(tmp_path / name) for name in sets]
    assert main(["merge", str(tmp_path / "m"), *places, "--quiet"]) == 0
    capsys.readouterr()
    assert verify(tmp_path / "m", capsys)[0] == 0
    merged = parse_index((tmp_path / "m" / "index.json").read_bytes(), "m")
    assert {name: (bucket.grid, bucket.num_samples) for name, bucket in merged.buckets.items()} == {
        "32x32": ((4, 4), 36 + 12),
        "40x24": ((5, 3), 12),
        "24x40": ((3, 5), 12),
    }
    mixture = Mixture([ShardSet.open(place, "train") for place in places])
    assert {name: bucket.num_samples for name, bucket in mixture.buckets.items()} == {
        name: bucket.num_samples for name, bucket in merged.buckets.items()
    }
    read = itertools.islice(stream(mixture, seed=0, global_batch=6, micro_batch=6, rank=0, world=1), 24)
    of_square = set[str]()
    for step in read:
        (batch,) = step.batches
        if batch.latent.shape[-1] == batch.latent.shape[-2]:
            of_square |= {key[0] for key in batch.keys}
    assert of_square == {"a", "b"}  # a bucket that both have takes from both


def _only(folder: Path, split: str) -> None:
    """Make a folder one of a single split."""
    index = parse_index((folder / "index.json").read_bytes(), "x")
    shards = [shard for shard in index.shards if shard.split == split]
    counts = {name: sum(s.num_samples for s in shards if s.bucket == name) for name in index.buckets}
    buckets = {name: bucket._replace(num_samples=counts[name]) for name, bucket in index.buckets.items()}
    index = replace(index, shards=shards, splits={split: index.splits[split]}, buckets=buckets)
    (folder / "index.json").write_bytes(index_bytes(index))


def test_what_cannot_be_merged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "m"), str(folder), str(folder), "--quiet"]) == 2
    assert "merge folders that share no picture" in capsys.readouterr().err
    other = make_shards(tmp_path / "other", 12, patch_size=4)
    assert main(["merge", str(tmp_path / "n"), str(folder), str(other), "--quiet"]) == 2
    assert "error: " in capsys.readouterr().err
    hurt = copy(folder, tmp_path / "d")
    tar = sorted(hurt.glob("*.tar"))[0]
    tar.write_bytes(b"\xff" + tar.read_bytes()[1:])
    assert main(["merge", str(tmp_path / "o"), str(hurt), "--quiet"]) == 2
    assert f"{tar}: damaged" in capsys.readouterr().err
    assert not (tmp_path / "o" / "index.json").exists()


@pytest.mark.parametrize("command", ["verify", "stats", "show"])
def test_a_folder_that_is_none(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "no index.json" in capsys.readouterr().err
