"""Aspect buckets at their real size: 512 px, a codec of factor 8, sides in steps of 64, and three numbers of tokens.

The same things are compared family by family on a few tokens elsewhere (docs/design/0011); here they are seen together
where positions, latents and grids are as large as users have them.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import sharpmoe
from sharpmoe.checkpoint import manifest
from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.contract.tutorials import draw_photos, run_command
from tests.distributed import run_ranks
from tests.fixtures_data import tiny_autoencoder
from tests.train.setting import identical, make_run, plan_for

BUCKETS = {"320x704": 880, "576x448": 1008, "512x512": 1024}  # H x W pixels: tokens
STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    photos = draw_photos(folder / "photos", 36, sides=((352, 160), (224, 288), (256, 256)))
    codec = tiny_autoencoder(folder / "vae", levels=4)
    words = ["--source", str(photos), "--buckets", "512", "--bucket-step", "64", "--encoder", "hash"]
    words += ["--codec", "autoencoder_kl", "--codec-name", str(codec), "--posterior", "std", "--flip-pair"]
    run_command(["python", "launcher/prepare.py", *words, "--out", str(folder / "shards")])
    return folder / "shards"


def of_rank(world: World, run: RunConfig) -> manifest.Progress:
    return manifest.read_manifest(loop.train(plan_for(run, world), world)).progress


def run_on(shards: Path, output: Path, router: str, ep_size: int, resume: str = "none") -> RunConfig:
    info = sharpmoe.open_shards(shards)
    sizes = {"width": 16, "depth": 2, "latent_size": 64, "latent_channels": 4}
    text = {"text_width": info.text_width, "pooled_width": info.pooled_width}
    return make_run(
        shards,
        output,
        router,
        model=sizes | text,
        rollout={"num_steps": 2},
        train={"steps": STEPS, "global_batch": 4, "micro_batch": 2},
        parallel={"ep_size": ep_size},
        checkpoint={"every": STOP, "keep": 9, "resume": resume},
    )


def weights(folder: Path, step: int = STEPS) -> list[dict]:  # type: ignore[type-arg]
    last = folder / "run" / "checkpoints" / f"step{step:08}"
    return [load_file(last / f"{kind}.safetensors") for kind in ("live", "ema")]


@pytest.mark.dist
@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("router", ["diffmoe", "ec"])
def test_a_run_at_512_pixels(router: str, shards: Path, tmp_path: Path) -> None:
    """One rank and two that share the experts agree; a run that is stopped goes on bit for bit; each shape is drawn."""
    assert set(sharpmoe.open_shards(shards).buckets) == set(BUCKETS)
    logs = {}
    for ep_size in (1, 2):  # as many ranks: micro-batches of two images in both, so DiffMoE's pools are the same
        whole, cut = tmp_path / f"whole{ep_size}", tmp_path / f"cut{ep_size}"
        end, *_ = run_ranks(of_rank, ep_size, run_on(shards, whole, router, ep_size))
        stopped = str(whole / "run" / "checkpoints" / f"step{STOP:08}")
        again, *_ = run_ranks(of_rank, ep_size, run_on(shards, cut, router, ep_size, stopped))
        assert again == end
        assert all(identical(a, b) for a, b in zip(weights(whole), weights(cut), strict=True))
        logs[ep_size], resumed = (read_log(folder / "run" / "log.jsonl") for folder in (whole, cut))
        assert [resumed["loss/total"][step] for step in range(STOP + 1, STEPS + 1)] == [
            logs[ep_size]["loss/total"][step] for step in range(STOP + 1, STEPS + 1)
        ]
        speed, seconds = (logs[ep_size][f"throughput/{name}"] for name in ("tokens_per_second", "seconds_per_step"))
        assert {round(speed[step] * seconds[step] / (4 * 2)) for step in speed} == set(BUCKETS.values())
    for name in ("loss/total", "loss/flow", "loss/routing"):
        assert logs[1][name] == pytest.approx(logs[2][name], rel=1e-5)
    run = tmp_path / "whole2" / "run"
    file = shutil.copy(run / "checkpoints" / f"step{STEPS:08}" / "ema.safetensors", tmp_path)  # its run has no base
    drawn_by = [str(file), "--shards", str(shards)]
    for size in BUCKETS:
        height, width = size.split("x")
        words = ["--captions", "a red disc", "--steps", "2", "--width", width, "--height", height]
        run_command(["python", "launcher/sample.py", *drawn_by, *words, "--out", str(tmp_path / size)])
        (drawn,) = (tmp_path / size).glob("000_*.png")
        assert Image.open(drawn).size == (int(width), int(height))
    plan = ["--config", str(run / "config.yaml"), "--world", "2", "--ep", "2", "--json"]
    shown = json.loads(run_command(["python", "launcher/plan.py", *plan, "--checkpoint.init", "base.safetensors"]))
    assert shown["tokens"] == max(BUCKETS.values())
