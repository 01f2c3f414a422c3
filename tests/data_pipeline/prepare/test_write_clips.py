"""Animations as shards: latents and maps of every frame, and what refuses what."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.encode.saliency import parse_saliency
from data_pipeline.prepare.merge import merge_folders
from data_pipeline.prepare.recipe import Recipe, recipe_of
from data_pipeline.prepare.saliency_kinds import SALIENCIES
from data_pipeline.prepare.write import prepare_shards
from data_pipeline.read.folder import read_index
from data_pipeline.read.shards import ShardSet
from data_pipeline.read.verify import verify_folder
from data_pipeline.sources.animations import load_clip
from data_pipeline.sources.items import ImageSource
from data_pipeline.sources.open import SourceOptions, open_source
from data_pipeline.store.store import open_store
from launcher.prepare import main
from sharpmoe.errors import DataError
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import save_weights
from sharpmoe.saliency import saliency_map
from tests.fixtures_data import QUIET, make_animations, make_clips, make_shards
from tests.toys import toy_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"))


def test_a_clip_is_its_frames_encoded_one_by_one(folder: Path) -> None:
    shards = ShardSet.open(folder, "train")
    assert (shards.frames, shards.latent_shape, shards.grid) == (4, (4, 4, 8, 8), (4, 4, 4))
    assert list(shards.buckets) == ["4x32x32"]
    codec, batch = shards.codec_object(), shards.batch(range(shards.num_samples))
    files = {path.stem: path for path in (folder.parent / "animations").iterdir() if path.suffix != ".txt"}
    for row, key in enumerate(batch.keys):
        frames = torch.from_numpy(load_clip(files[key.split("-")[0]], (32, 32), "crop", 4).pixels).transpose(0, 1)
        expected = codec.encode(frames).half().float().transpose(0, 1)
        assert torch.equal(batch.latent[row], expected)
        assert torch.equal(batch.saliency[row], saliency_map(frames, (4, 4)).flatten())
    moving = batch.latent[:, :, 0] - batch.latent[:, :, 3]
    assert all(float(each.abs().max()) > 0.1 for each in moving)


def test_the_folder_tells_its_frames_and_is_sound(folder: Path) -> None:
    assert json.loads((folder / "recipe.json").read_text())["request"]["frames"] == 4
    index, _ = read_index(open_store(folder))
    assert index.frames == 4
    checked = verify_folder(open_store(folder), index)
    assert (checked.samples, checked.damage) == (12, [])


def test_still_images_are_as_they_were(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "still")
    assert "frames" not in json.loads((folder / "recipe.json").read_text())["request"]
    assert ShardSet.open(folder, "train").frames == 1


def test_what_is_too_short_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = make_animations(tmp_path / "animations", count=12, frames=4)  # every third has five frames
    Image.new("RGB", (32, 32)).save(folder / "still.jpg")
    (folder / "still.txt").write_text("no animation")
    words = [
        "--source",
        str(folder),
        "--frames",
        "5",
        "--size",
        "32",
        "--encoder",
        "hash",
        "--out",
        str(tmp_path / "s"),
    ]
    assert main([*words, "--max-bad-share", "0.5"]) == 2  # most of them
    assert main([*words, "--max-bad-share", "0.8"]) == 0
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["too short: 1 frames, fewer than the 5 of --frames"] + 8 * [
        "too short: 4 frames, fewer than the 5 of --frames"
    ]
    assert main([*words, "--dry-run", "--max-bad-share", "0.8"]) == 0


def test_buckets_and_mirror_images_have_frames_too(tmp_path: Path) -> None:
    shards = ShardSet.open(make_clips(tmp_path, buckets="32x32,16x48", flip_pair=True), "train")
    (bucket,) = shards.buckets.values()  # the animations are square
    assert (list(shards.buckets), bucket.grid) == (["4x32x32"], (4, 4, 4))
    table = json.loads((tmp_path / "shards" / "train-4x32x32-00000.json").read_text())
    assert "latent_flip.npy" in table["samples"][0][1]


@pytest.mark.parametrize("kind", ["foreground:missing=laplacian", "foreground:missing=flat"])
def test_every_kind_of_maps_is_made_frame_by_frame(kind: str, tmp_path: Path) -> None:
    shards = ShardSet.open(make_clips(tmp_path, saliency=parse_saliency(kind, SALIENCIES)), "train")
    batch = shards.batch([0])
    assert batch.saliency.shape == (1, 64)
    assert bool((batch.saliency == 0).all()) == kind.endswith("flat")


def options(**given: object) -> dict[str, object]:
    plain = {"size": None, "buckets": "", "bucket_step": None, "like": None, "codec_from": None, "moments": None}
    content = {"patch_size": 2, "shard_samples": 512, "limit": None, "max_bad_share": 0.5, "allow_missing": False}
    kinds = {"posterior": "mean", "flip_pair": False, "fit": "crop", "text_dtype": "float16", "saliency": "laplacian"}
    return {**plain, **content, **kinds, "encoder": None, "max_length": 16, "join": "tokens", "frames": 1, **given}


def test_like_takes_its_frames_or_adds_them_to_still_images(folder: Path, tmp_path: Path) -> None:
    weights, still = tmp_path / "base.safetensors", make_shards(tmp_path / "still")
    clips = ShardSet.open(folder, "train")
    config = toy_config(latent_frames=4)
    meta = {"codec": json.dumps({"kind": "pixel"}), "encoder": json.dumps(clips.encoder)}
    save_weights(weights, build_model(config).state_dict(), config, meta)
    for place in (folder, weights):
        assert recipe_of(options(like=str(place), frames=4)).frames == 4
        for frames in (1, 8):
            with pytest.raises(DataError, match=f"--like .*: has clips of 4 frames, asked for {frames}; add"):
                recipe_of(options(like=str(place), frames=frames))
    assert recipe_of(options(like=str(still), frames=8)).frames == 8  # a still base on frames
    assert recipe_of(options(codec_from=str(folder), frames=2)).frames == 2


def like(folder: Path, **fields: Any) -> tuple[ImageSource, Recipe]:
    """The animations of a folder of shards, and its recipe with its own codec."""
    source = open_source(SourceOptions(source=str(folder.parent / "animations")))
    return source, replace(recipe_of(options(size=32, like=str(folder), frames=4)), **fields)


def test_other_frames_are_another_folder(folder: Path, tmp_path: Path) -> None:
    source, two = like(folder, frames=2)
    prepare_shards(source, tmp_path / "two", two, QUIET)
    with pytest.raises(DataError, match="was prepared with frames = 2, now asked for 3"):
        prepare_shards(source, tmp_path / "two", replace(two, frames=3), QUIET)
    with pytest.raises(DataError, match=r"frames is 2, .* has 4; prepare both alike"):
        merge_folders([open_store(folder), open_store(tmp_path / "two")], tmp_path / "all")


def test_clips_have_a_limit_of_tokens(folder: Path, tmp_path: Path) -> None:
    source, recipe = like(folder, frames=20_000)
    with pytest.raises(DataError, match=r"--frames 20000: a clip of 32x32 pixels has 320000 tokens, at most 262144"):
        prepare_shards(source, tmp_path / "long", recipe, QUIET)


def test_the_numbers_of_a_clip_do_not_depend_on_how_many_are_encoded_together(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(folder, "train")
    source, recipe = like(folder, shard_samples=1)
    prepare_shards(source, tmp_path / "one", recipe, QUIET)
    again = ShardSet.open(tmp_path / "one", "train")
    one, other = shards.batch(range(shards.num_samples)), again.batch(range(again.num_samples))
    assert one.keys == other.keys
    assert np.allclose(one.latent, other.latent, atol=2e-3)
