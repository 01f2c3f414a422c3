"""Animated images from files to samples: prepare, train from a still base, evaluate, draw, look at the result."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import sharpmoe
from data_pipeline.read.shards import ShardSet
from launcher import evaluate, plan, sample
from sharpmoe.checkpoint.manifest import read_manifest
from sharpmoe.config import RunConfig, SampleConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.parallel.ranks import launch
from sharpmoe.report.figures import clip_pixels
from sharpmoe.report.samples import Prompts, draw_images, encode_prompts
from sharpmoe.train import loop
from sharpmoe.train.setup import initial_model
from tests.fixtures_data import make_clips, make_shards
from tests.train.setting import ALONE, make_run, plan_for, stirred_model

FRAMES = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"), frames=FRAMES)


def run_on(shards: Path, output: Path, **sections: dict) -> RunConfig:
    model = {"latent_frames": FRAMES} | sections.pop("model", {})
    return make_run(shards, output, "diffmoe", model=model, **sections)


@pytest.mark.slow
def test_clips_go_all_the_way(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run_on(shards, tmp_path, model={"latent_frames": 1, "saliency_router": False})
    save_weights(tmp_path / "base.safetensors", stirred_model(base).state_dict(), base.model)
    run = run_on(
        shards,
        tmp_path,
        name="run",
        train={"steps": 2, "global_batch": 4, "micro_batch": 2},
        checkpoint={"init": str(tmp_path / "base.safetensors")},
        data={"validation_split": "train"},
        log={"validate_every": 2, "sample_every": 2, "allocation": True, "allocation_images": 2},
        sample={"captions": ["a red square moving right"], "num_steps": 2, "cfg_scale": 2.0},
    )
    planned = plan_for(run, ALONE)
    assert "trained on still images, the run has 4 frames (model.latent_frames)" in initial_model(planned).notes[0]
    assert launch.start() == ALONE
    try:
        checkpoint = loop.train(planned, ALONE)
    finally:
        launch.stop()
    assert "cannot" not in (tmp_path / "run" / "log.jsonl").read_text()
    assert (tmp_path / "run" / "samples" / "step00000002.png").is_file()
    assert (tmp_path / "run" / "routing" / "step00000002.png").is_file()
    assert read_manifest(checkpoint).model.latent_frames == FRAMES

    assert plan.main(["--config", str(tmp_path / "run" / "config.yaml"), "--world", "2"]) == 0
    assert "64 tokens per image" in capsys.readouterr().out
    words = [str(tmp_path / "base.safetensors"), str(tmp_path / "run"), "--shards", str(shards), "--split", "train"]
    assert evaluate.main([*words, "--images", "2", "--out", str(tmp_path / "evaluation")]) == 0
    assert "change (paired)" in capsys.readouterr().out

    words = [str(tmp_path / "run"), "--steps", "2", "--out", str(tmp_path / "drawn"), "--fps", "10", "--cfg-scale", "2"]
    captions = ["a red square moving right", "a blue square"]
    assert sample.main([*words, "--captions", *captions]) == 0
    assert sample.main([*words, "--captions", *captions]) == 0  # the same pictures again: no second names
    names = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert names == {"000_a-red-square-moving-right.webp", "001_a-blue-square.webp", "grid.png"}
    assert_is_what_the_model_draws(tmp_path / "drawn" / "001_a-blue-square.webp", checkpoint, shards, captions)
    for option in (["--film"], ["--counterfactual"]):
        assert sample.main([*words, *option]) == 2
    assert "takes still images alone, the model has clips of 4 frames" in capsys.readouterr().err


def assert_is_what_the_model_draws(path: Path, checkpoint: Path, shards: Path, captions: list[str]) -> None:
    """A fresh look at an animation: its frames are those of the model, in the order and at the speed asked for."""
    model, _ = load_model(checkpoint / "ema.safetensors")
    source = ShardSet.open(shards, "train")
    request = encode_prompts(model.config, source, Prompts(tuple(captions)))
    clips = draw_images(model, request, SampleConfig(num_steps=2, cfg_scale=2.0), source.codec_object().decode)
    assert clips.shape == (2, 3, FRAMES, 32, 32)
    frames = clip_pixels(clips)[1]
    assert all(not np.array_equal(one, other) for one, other in pairwise(frames))
    with Image.open(path) as image:
        seen = [(np.asarray(each.convert("RGB")), each.info["duration"]) for each in ImageSequence.Iterator(image)]
    assert [duration for _, duration in seen] == [100] * FRAMES
    assert all(np.array_equal(found, frame) for (found, _), frame in zip(seen, frames, strict=True))


def test_what_does_not_fit_is_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"made for model\.latent_frames 4, the run has 1; set model"):
        plan_for(run_on(shards, tmp_path, model={"latent_frames": 1}), ALONE)
    with pytest.raises(DataError, match=r"made for model\.latent_frames 1, the run has 4"):
        plan_for(run_on(make_shards(tmp_path / "still"), tmp_path), ALONE)
    clips = ShardSet.open(shards, "train")
    with pytest.raises(DataError, match="holds clips of 4 frames; a classifier takes still images alone"):
        clips.require_still("a classifier")
    model = build_model(run_on(shards, tmp_path).model)
    with pytest.raises(ConfigError, match=r"sharpmoe\.sample: film and counterfactual: takes still images alone"):
        sharpmoe.sample(model, "a red square", shards=clips, film=tmp_path / "film")


def test_clips_from_python_are_their_frames(shards: Path, tmp_path: Path) -> None:
    model, clips = stirred_model(run_on(shards, tmp_path)).eval(), ShardSet.open(shards, "train")
    first, second = sharpmoe.sample(model, ["a red square", "a blue square"], shards=clips, num_steps=2, seed=3)
    assert [frame.size for frame in (*first, *second)] == [(32, 32)] * (2 * FRAMES)
    request = encode_prompts(model.config, clips, Prompts(("a red square", "a blue square")))
    drawn = draw_images(model, request, SampleConfig(num_steps=2, seed=3), clips.codec_object().decode)
    for found, frames in zip((first, second), clip_pixels(drawn), strict=True):
        assert all(np.array_equal(np.asarray(one), other) for one, other in zip(found, frames, strict=True))


def test_a_batch_of_clips_is_an_array_of_frames(shards: Path, tmp_path: Path) -> None:
    """Drawn at once, in two parts, and as single requests: the same numbers."""
    model = stirred_model(run_on(shards, tmp_path, model={"conditioning": "class", "num_classes": 3}))
    save_weights(tmp_path / "class.safetensors", model.state_dict(), model.config)
    words = [str(tmp_path / "class.safetensors"), "--shards", str(shards), "--num", "5", "--steps", "2", "--seed", "3"]
    words += ["--batch-size", "2"]
    assert sample.main([*words, "--npz", str(tmp_path / "whole.npz")]) == 0
    for part in ("1/2", "2/2"):
        assert sample.main([*words, "--npz", str(tmp_path / "parts.npz"), "--part", part]) == 0
    assert sample.main([*words, "--npz", str(tmp_path / "parts.npz"), "--join", "2"]) == 0
    whole, parts = (np.load(tmp_path / name)["arr_0"] for name in ("whole.npz", "parts.npz"))
    assert (whole.shape, whole.dtype) == ((5, FRAMES, 32, 32, 3), np.uint8)
    assert np.array_equal(whole, parts)
    model, _ = load_model(tmp_path / "class.safetensors")
    drawn = sharpmoe.sample(model, [0, 1, 2, 0, 1], shards=shards, num_steps=2, seed=3, batch_size=2)
    near = [[np.asarray(frame).astype(int) for frame in frames] for frames in drawn]
    assert np.abs(np.array(near) - whole).max() <= 1  # rounded there, truncated here
    assert json.loads((tmp_path / "whole.json").read_text())["frames"] == FRAMES


def test_the_loss_of_a_batch_of_clips(shards: Path, tmp_path: Path) -> None:
    model = build_model(run_on(shards, tmp_path).model).train()
    clips = ShardSet.open(shards, "train")
    batch = clips.batch([0, 1])
    loss = sharpmoe.rollout_loss(model, batch, empty_text=clips.empty_text())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    with pytest.raises(DataError, match=r"latent has shape .*, expected \(B, 4, T, H, W\)"):
        sharpmoe.rollout_loss(model, batch._replace(latent=batch.latent[:, :, 0]), empty_text=clips.empty_text())
