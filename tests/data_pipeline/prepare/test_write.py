import errno
import fcntl
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

import data_pipeline.prepare.finish as finish
import data_pipeline.prepare.write as write
from data_pipeline.encode.autoencoders import KLAutoencoder
from data_pipeline.encode.build import build_text_encoder
from data_pipeline.encode.codecs import Pixel
from data_pipeline.index import parse_index
from data_pipeline.members import decode_npy
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.write import Machine, prepare_shards
from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.images import load_picture
from data_pipeline.sources.items import Item, Place, Skipped, Unit
from sharpmoe import durable
from sharpmoe.errors import DataError
from sharpmoe.saliency import saliency_map
from tests.fixtures_data import QUIET, ShapesSource, make_shards, shapes_recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def named(key: str) -> Item:
    return Item(key=key, split="", captions=(), image=Place(""), name="")


class Stop(BaseException):
    """A killed process."""


def stop_after(
    count: int, monkeypatch: pytest.MonkeyPatch, name: str = "_write_shard", module: ModuleType = write
) -> None:
    real, calls = getattr(module, name), []

    def limited(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) > count:
            raise Stop
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, name, limited)


def test_what_lies_in_a_shard(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    with tarfile.open(folder / "train-00000.tar") as archive:
        names = archive.getnames()
    assert {name.split(".", 1)[1] for name in names} == {
        *("latent.npy", "text.npy", "pooled.npy", "saliency.npy", "foreground.npy", "json", "txt")
    }
    assert {path.name for path in folder.iterdir()} == {
        *(".lock", "recipe.json", "codec.safetensors", "empty_text.npz", "index.json", "unseen-00000.tar"),
        *("unseen-00000.json", "train-00000.tar", "train-00000.json", "train-00001.tar", "train-00001.json"),
        *("train-00002.tar", "train-00002.json", ".counts"),
    }


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    shards = ShardSet.open(folder, "train")
    read = list(webdataset.WebDataset(str(folder / "train-00000.tar"), shardshuffle=False))
    assert len(read) == 8
    ours = shards.batch([0])
    assert read[0]["__key__"] == ours.keys[0]
    assert read[0]["txt"].decode() == ours.captions[0]
    latent = np.lib.format.read_array(io.BytesIO(read[0]["latent.npy"]), allow_pickle=False)
    assert latent.dtype == np.float16
    assert torch.equal(torch.from_numpy(latent).float(), ours.latent[0])


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    assert contents(make_shards(tmp_path / "a")) == contents(make_shards(tmp_path / "b"))


def test_a_second_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_shards(tmp_path / "d")
    before = contents(folder)
    monkeypatch.setattr(ShapesSource, "survey", None)
    done = prepare_shards(ShapesSource(), folder, shapes_recipe())
    assert not done.worked
    assert done.splits == {"train": 20, "unseen": 4}
    assert contents(folder) == before


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_killed_run_goes_on_after_its_last_shard(
    finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(make_shards(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(finished, patch)
        with pytest.raises(Stop):
            make_shards(tmp_path / "d")
    assert not (tmp_path / "d" / "index.json").exists()
    stop_after(4 - finished, monkeypatch)
    assert contents(make_shards(tmp_path / "d")) == whole


@pytest.mark.parametrize("written", range(16))
def test_a_run_killed_before_any_file_goes_on(written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(make_shards(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(written, patch, "_write", durable)
        with pytest.raises(Stop):
            make_shards(tmp_path / "d")
    assert contents(make_shards(tmp_path / "d")) == whole


@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.json", "codec.safetensors", "empty_text.npz"])
def test_a_deleted_file_is_written_again(name: str, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    before = contents(folder)
    (folder / name).unlink()
    assert prepare_shards(ShapesSource(), folder, shapes_recipe()).worked
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"image_size": 64}, "image_size = 32, now asked for 64"),
        ({"patch_size": 1}, "patch_size = 2"),
        ({"codec": {"kind": "pixel"}}, "codec.channels = 4"),
        ({"codec": {"kind": "patch_pca", "patch": 4, "channels": 4, "whiten": 1.0}}, "codec.whiten = 0.5"),
        ({"encoder": {"kind": "hash", "width": 32, "max_length": 8}}, "encoder.max_length = 16"),
        ({"shard_samples": 16}, "shard_samples = 8"),
        ({"limit": 3}, "limit = None"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_two_configurations_never_mix(change: dict[str, Any], key: str, complete: bool, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    if not complete:
        (folder / "index.json").unlink()
    before = contents(folder)
    with pytest.raises(DataError, match=key):
        prepare_shards(ShapesSource(), folder, replace(shapes_recipe(), **change))
    assert contents(folder) == before


def test_another_source_never_mixes(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    with pytest.raises(DataError, match=r"source.num_images = 24, now asked for 25"):
        prepare_shards(ShapesSource(25), folder, shapes_recipe())


def test_shards_without_a_recipe_are_not_trusted(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    (folder / "recipe.json").unlink()
    with pytest.raises(DataError, match=r"holds shards but no recipe.json"):
        make_shards(folder)


def test_shards_are_not_mixed_with_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / ".DS_Store").touch()  # hidden files are no reason
    (folder / "cat.jpg").touch()
    with pytest.raises(DataError, match=r"d: holds other files \('cat.jpg'\), no place for shards; choose another"):
        make_shards(folder)
    (folder / "cat.jpg").unlink()
    assert make_shards(folder) == folder


@pytest.mark.parametrize("before", [True, False])
def test_a_recipe_that_another_rank_writes_meanwhile_is_no_other_file(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may be through with all of its shards right before, or right after, this one looks for a recipe."""
    read, begun = write._read_json, list[Path]()

    def interrupted(path: Path) -> dict[str, Any] | None:
        found = read(path)
        if begun:
            return found
        begun.append(path)
        other = tmp_path / "other"
        make_shards(other)
        for file in sorted(other.iterdir(), key=lambda file: file.name != "recipe.json"):
            if file.is_file() and not file.name.startswith("."):
                shutil.copy(file, path.parent)
        return read(path) if before else found

    monkeypatch.setattr(write, "_read_json", interrupted)
    assert prepare_shards(ShapesSource(), tmp_path / "d", shapes_recipe(), Machine(place=Rank(0, 2))).complete
    assert begun == [tmp_path / "d" / "recipe.json"]
    monkeypatch.undo()
    ours, theirs = (contents(tmp_path / name) for name in ("d", "other"))
    assert all(ours[name] == content for name, content in theirs.items() if not name.startswith("."))


def test_a_refused_configuration_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="patch size 3 does not divide the 8x8 latent"):
        make_shards(tmp_path / "d", patch_size=3)
    with pytest.raises(DataError, match="multiple of 4"):
        make_shards(tmp_path / "d", size=30)
    make_shards(tmp_path / "d")


@pytest.mark.parametrize("change", [{"limit": 0}, {"image_size": -1}, {"shard_samples": 0}, {"patch_size": 0}])
def test_numbers_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="whole number from 1 up"):
        prepare_shards(ShapesSource(), tmp_path / "d", replace(shapes_recipe(), **change))


def test_unreadable_pictures_are_skipped_and_listed(tmp_path: Path) -> None:
    recipe = replace(shapes_recipe(), max_bad_share=0.1)
    done = prepare_shards(ShapesSource(broken=(3, 8)), tmp_path / "d", recipe)
    assert done.splits == {"train": 18, "unseen": 4}
    assert {entry.name for entry in done.skipped} == {"shape-0003", "shape-0008"}
    assert all("unreadable" in entry.reason for entry in done.skipped)
    assert prepare_shards(ShapesSource(broken=(3, 8)), tmp_path / "d", recipe) == replace(done, worked=False)
    keys = ShardSet.open(tmp_path / "d", "train").batch(range(18)).keys
    assert "shape-0003" not in keys


def test_too_many_unreadable_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 pictures \(4.2%\) cannot be used, at most 1.0%.*shape-0003: unreadable"
    ) as e:
        prepare_shards(ShapesSource(broken=(3,)), tmp_path / "d", replace(shapes_recipe(), max_bad_share=0.01))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "d" / "index.json").exists()


def test_what_the_source_skipped_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = ShapesSource.survey

    def with_one_left_out(source: ShapesSource, unit: Unit) -> Iterator[Item | Skipped]:
        yield from survey(source, unit)
        if 0 in unit.records:
            yield Skipped("x.png", "no caption in x.txt")

    monkeypatch.setattr(ShapesSource, "survey", with_one_left_out)
    with pytest.raises(DataError, match=r"1 pictures \(4.0%\).*x.png: no caption"):
        prepare_shards(ShapesSource(), tmp_path / "d", replace(shapes_recipe(), limit=5, max_bad_share=0.01))


def test_a_split_whose_pictures_are_all_unreadable(tmp_path: Path) -> None:
    prepare_shards(ShapesSource(broken=(5, 11, 17, 23)), tmp_path / "d", replace(shapes_recipe(), max_bad_share=0.5))
    assert ShardSet.open(tmp_path / "d", "train").num_samples == 20
    with pytest.raises(DataError, match=r"no samples in split 'unseen'; it has train \(20\), unseen \(0\)"):
        ShardSet.open(tmp_path / "d", "unseen")


def test_no_training_picture_to_fit_on(tmp_path: Path) -> None:
    broken = tuple(number for number in range(24) if number % 6 != 5)
    with pytest.raises(DataError, match="no readable image to fit"):
        prepare_shards(ShapesSource(broken=broken), tmp_path / "d", replace(shapes_recipe(), max_bad_share=1.0))


def test_a_limit_takes_a_bit_of_everything(tmp_path: Path) -> None:
    done = prepare_shards(ShapesSource(240), tmp_path / "d", replace(shapes_recipe(), limit=60))
    assert sum(done.splits.values()) == 60
    assert 4 <= done.splits["unseen"] <= 18


def test_a_latent_that_is_not_finite_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pixel, "encode", lambda _, images: images * 1e6)  # beyond float16
    with pytest.raises(DataError, match=r"shape-\d+: its latent is not finite"):
        prepare_shards(ShapesSource(), tmp_path / "d", replace(shapes_recipe(), codec={"kind": "pixel"}))


def test_what_was_left_out_is_listed_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "LISTED_SKIPPED", 1)
    done = prepare_shards(ShapesSource(broken=(3, 8)), tmp_path / "d", shapes_recipe(), QUIET)
    assert (len(done.skipped), done.num_skipped) == (1, 2)
    lines = [json.loads(line) for line in (tmp_path / "d" / finish.SKIPPED_FILE).read_text().splitlines()]
    assert {line["name"] for line in lines} == {"shape-0003", "shape-0008"}
    assert all(line["reason"].startswith("unreadable: ") for line in lines)
    assert prepare_shards(ShapesSource(broken=(3, 8)), tmp_path / "d", shapes_recipe(), QUIET).num_skipped == 2


def test_a_disk_that_fails_is_not_a_picture_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ShapesSource, "read", failing)
    with pytest.raises(DataError, match="shape-.*: cannot be read .*Input/output error.*run the same command again"):
        make_shards(tmp_path / "d")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            make_shards(tmp_path)
    make_shards(tmp_path)


def test_the_lock_is_tried_before_the_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapesSource, "units", lambda _: pytest.fail("read"))
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process"):
            make_shards(tmp_path)


def test_a_source_that_cannot_be_used_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def units(_: ShapesSource) -> list[Unit]:
        raise DataError("no captioned image")

    monkeypatch.setattr(ShapesSource, "units", units)
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(DataError, match="no captioned image"):
            make_shards(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        make_shards(tmp_path / "d")


def test_a_damaged_recipe_is_one_line(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    (folder / "recipe.json").write_text("{")
    with pytest.raises(DataError, match=r"recipe.json: damaged"):
        make_shards(folder)


def test_shards_can_be_moved(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    fingerprint = ShardSet.open(folder, "train").fingerprint
    shutil.move(folder, tmp_path / "e")
    assert ShardSet.open(tmp_path / "e", "train").fingerprint == fingerprint
    assert str(tmp_path) not in json.dumps((tmp_path / "e" / "index.json").read_text())


# --- several captions, mirror images, buckets -------------------------------------------------------------------------


def raw(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    read = webdataset.WebDataset(str(folder / f"{name}.tar"), shardshuffle=False)
    return {sample["__key__"]: sample for sample in read}


def test_several_captions_of_one_picture(tmp_path: Path) -> None:
    one, three = make_shards(tmp_path / "one"), make_shards(tmp_path / "three", captions=3)
    first, several = raw(one, "train-00000"), raw(three, "train-00000")
    encoder = build_text_encoder(shapes_recipe().encoder)
    assert first.keys() == several.keys()
    for key, sample in several.items():
        meta = json.loads(sample["json"])
        assert [entry["weight"] for entry in meta["captions"]] == [1.0, 2.0, 3.0]
        assert meta["captions"][0]["text"] == sample["txt"].decode()
        for number, suffix in enumerate(("", "1", "2")):
            states = encoder.encode([meta["captions"][number]["text"]])
            np.testing.assert_array_equal(decode_npy(sample[f"text{suffix}.npy"]), states.states[0].half())
            np.testing.assert_allclose(decode_npy(sample[f"pooled{suffix}.npy"]), states.pooled[0], rtol=1e-6)
        assert all(sample[name] == first[key][name] for name in ("latent.npy", "text.npy", "saliency.npy", "txt"))
    assert "captions" not in json.loads(next(iter(first.values()))["json"])


def test_mirror_images_are_stored_beside_latents(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d", flip_pair=True)
    codec = ShardSet.open(folder, "train").codec_object()
    for key, sample in raw(folder, "train-00000").items():
        content = ShapesSource().read(named(key))
        images = torch.from_numpy(load_picture(content, (32, 32)).pixels)[None]
        for name, image in (("latent", images), ("latent_flip", images.flip(-1))):
            np.testing.assert_array_equal(decode_npy(sample[f"{name}.npy"]), codec.encode(image)[0].half())


def test_pictures_go_into_shards_of_their_shape(tmp_path: Path) -> None:
    said: list[str] = []
    sides = ((1.0, 1.0), (1.0, 2.5), (3.0, 1.0))
    recipe = replace(shapes_recipe(), buckets="32x32,16x64,64x16")
    prepare_shards(ShapesSource(48, sides=sides), tmp_path / "d", recipe, QUIET._replace(say=said.append))
    index = parse_index((tmp_path / "d" / "index.json").read_bytes(), "")
    assert {name: bucket.num_samples for name, bucket in index.buckets.items()} == dict.fromkeys(index.buckets, 16)
    assert set(index.buckets) == {"32x32", "16x64", "64x16"}
    for shard in index.shards:
        bucket = index.buckets[shard.bucket]
        assert shard.name.startswith(f"{shard.split}-{shard.bucket}-")
        for key, sample in raw(tmp_path / "d", shard.name).items():
            content = ShapesSource(48, sides=sides).read(named(key))
            pixels = torch.from_numpy(load_picture(content, bucket.image).pixels)[None]
            saliency = saliency_map(pixels, bucket.grid)[0]
            assert decode_npy(sample["latent.npy"]).shape == bucket.latent
            np.testing.assert_array_equal(decode_npy(sample["saliency.npy"]), saliency)
            assert bucket.image == ((32, 32), (16, 64), (64, 16))[int(key.split("-")[1]) % 3]
    assert said[0] == "bucket 32x32 (4x4 = 16 tokens): 16 pictures, 16 to train on, 0 enlarged, 0.0% cut off"
    assert said[3].startswith("small buckets, below 64")


def test_a_picture_whose_size_cannot_be_read_is_left_out_of_the_buckets(tmp_path: Path) -> None:
    recipe = replace(shapes_recipe(), buckets="32x32,16x64")
    done = prepare_shards(ShapesSource(broken=(3,)), tmp_path / "d", recipe, QUIET)
    assert [entry.name for entry in done.skipped] == ["shape-0003"]


# --- posterior of an autoencoder --------------------------------------------------------------------------------------


def autoencoder_recipe(folder: Path, posterior: str) -> Recipe:
    codec = {"kind": "autoencoder_kl", "name": str(folder)}
    return replace(shapes_recipe(), codec=codec, posterior=posterior, flip_pair=True)


@pytest.mark.parametrize("kind", ["mean", "std", "sample"])
def test_what_is_stored_of_a_posterior(kind: str, tmp_path: Path, autoencoder: Path) -> None:
    prepare_shards(ShapesSource(), tmp_path / "d", autoencoder_recipe(autoencoder, kind), QUIET)
    prepare_shards(ShapesSource(), tmp_path / "e", autoencoder_recipe(autoencoder, kind), QUIET)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    codec = KLAutoencoder(str(autoencoder))
    scores = []
    for key, sample in raw(tmp_path / "d", "train-00000").items():
        content = ShapesSource().read(named(key))
        images = torch.from_numpy(load_picture(content, (32, 32)).pixels)[None]
        for name, image in (("latent", images), ("latent_flip", images.flip(-1))):
            mean, std = codec.posterior(image)
            assert std is not None
            stored = torch.from_numpy(decode_npy(sample[f"{name}.npy"]).astype(np.float32))
            assert (f"{name}_std.npy" in sample) == (kind == "std")
            if kind == "sample":
                scores.append((stored - mean[0]) / std[0])
                continue
            torch.testing.assert_close(stored, mean[0], rtol=2e-3, atol=2e-3)
            if kind == "std":
                found = torch.from_numpy(decode_npy(sample[f"{name}_std.npy"]).astype(np.float32))
                torch.testing.assert_close(found, std[0], rtol=2e-3, atol=1e-4)
    if scores:
        drawn = torch.stack(scores)
        assert drawn.mean().item() == pytest.approx(0, abs=0.05)
        assert drawn.std().item() == pytest.approx(1, abs=0.05)
        assert (drawn[0] - drawn[1]).abs().mean() > 0.5


def test_a_codec_without_a_posterior(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="codec patch_pca has one latent per image; use posterior mean"):
        make_shards(tmp_path / "d", posterior="std")
    with pytest.raises(DataError, match="expected mean, std, sample"):
        make_shards(tmp_path / "d", posterior="mode")
