"""The error of a base as saliency, from its weights to shards."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.items import hash_int
from launcher.prepare import main
from sharpmoe import draws
from sharpmoe.model.backbone import TextCondition
from sharpmoe.model.weights import load_model, save_weights
from tests.toys import toy_model

SMALL = ("--size", "16", "--encoder", "hash", "--codec", "pixel")
COUNT = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 32x32 and 16x32 pixels, noise on one half."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(COUNT):
        generator = np.random.Generator(np.random.Philox(key=number))
        pixels = generator.integers(0, 255, ((32, 16)[number % 2], 32, 3), dtype=np.uint8)
        pixels[:, :16] = 128
        Image.fromarray(pixels).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text("picture " * (number % 3 + 1))
    return path


def base(path: Path, meta: dict[str, str] | None = None, **fields: object) -> str:
    sizes: dict[str, object] = {"latent_channels": 3, "latent_size": 16, "text_width": 32, "pooled_width": 32}
    model = toy_model("ec", saliency_router=False, **(sizes | fields))
    save_weights(path, model.state_dict(), model.config, meta)
    return f"base-error:path={path}"


def prepare(folder: Path, out: Path, *words: str) -> int:
    return main(["--source", str(folder), "--out", str(out), *SMALL, *words])


def test_maps_are_the_flow_loss_of_each_token(folder: Path, tmp_path: Path) -> None:
    text = base(tmp_path / "base.safetensors")
    assert prepare(folder, tmp_path / "out", "--saliency", f"{text},times=0.3/0.7,draws=2") == 0
    shards, (model, _) = ShardSet.open(tmp_path / "out", "train"), load_model(tmp_path / "base.safetensors")
    batch = shards.batch([1])
    assert shards.saliency == {
        "kind": "base-error",
        "file": "base.safetensors",
        "sha256": shards.saliency["sha256"],
        "times": [0.3, 0.7],
        "draws": 2,
    }
    condition = TextCondition(batch.text, batch.text_mask, batch.pooled)
    errors = []
    for seed in range(2):
        number = hash_int(batch.keys[0]) >> 2
        x1 = draws.noise(seed, [number], batch.latent.shape[1:], draws.Purpose.VALIDATION_NOISE)
        for t in (0.3, 0.7):
            x_t = (1 - t) * batch.latent + t * x1
            with torch.no_grad():
                v = model(x_t, torch.tensor([t]), condition).v
            errors.append((v - (x1 - batch.latent)).square().mean(1).reshape(8, 2, 8, 2).mean((1, 3)).flatten())
    error = torch.stack(errors).mean(0)
    torch.testing.assert_close(batch.saliency[0], error / (1 + error), rtol=1e-4, atol=1e-5)
    assert 0 < batch.saliency.min() < batch.saliency.max() < 1


@pytest.mark.parametrize("words", [(), ("--buckets", "16x16,8x16")])
def test_the_same_maps_every_time_and_in_any_company(words: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    text = base(tmp_path / "base.safetensors")
    found = []
    for name, more in (("one", ()), ("again", ("--shard-samples", "1"))):
        assert prepare(folder, tmp_path / name, "--saliency", text, *words, *more) == 0
        maps = {}
        for split in json.loads((tmp_path / name / "index.json").read_text())["splits"]:
            shards = ShardSet.open(tmp_path / name, split)
            maps |= {(batch := shards.batch([i])).keys[0]: batch.saliency[0] for i in range(shards.num_samples)}
        found.append(maps)
    assert len(found[0]) == COUNT
    for key, saliency in found[0].items():
        torch.testing.assert_close(saliency, found[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "meta", "message"),
    [
        ({"patch_size": 4}, {}, "its patch size is 4, that of the shards 2"),
        ({"latent_channels": 4}, {}, "takes 4 latent channels, these have 3"),
        ({"text_width": 8}, {}, "takes text states of 8 features, these have 32"),
        ({"conditioning": "class"}, {}, "takes classes 0 to 999, a picture has -1"),
        ({}, {"codec": '{"kind": "patch_pca"}'}, "was trained with another codec (patch_pca)"),
        ({}, {"encoder": '{"kind": "transformers"}'}, "was trained with another encoder (transformers)"),
    ],
)
def test_bases_that_do_not_fit(
    fields: dict[str, object],
    meta: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = base(tmp_path / "base.safetensors", meta, **fields)
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--saliency base-error:path=" in error
    assert message in error


def test_a_file_that_holds_no_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    assert prepare(folder, tmp_path / "out", "--saliency", f"base-error:path={tmp_path / 'no.safetensors'}") == 2
    assert "not a sound safetensors file" in capsys.readouterr().err
