"""Saliency maps of models in files, from pictures to shards."""

import builtins
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.recipe import recipe_of
from data_pipeline.prepare.write import Machine, prepare_shards
from data_pipeline.read.shards import ShardSet
from data_pipeline.sources.open import SourceOptions, open_source
from launcher.prepare import main
from launcher.shards import main as shards_main
from tests.onnx_file import sigmoid_model

SMALL = ("--size", "32", "--encoder", "hash", "--codec", "pixel", "--patch-size", "8")
COUNT = 12


class Brightness(nn.Module):
    """Two channels: darkness and brightness, each (B, h, w) in [0, 1] where colours are."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        light = images.mean(1, keepdim=True)
        return {"aux": light[:, :, ::2], "out": torch.cat([1 - light, light], 1)}


class OneAtATime(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[0] == 1
        return images.mean(1)


class Infinite(nn.Module):
    """Not a number for pictures without green."""

    def forward(self, images: Tensor) -> Tensor:
        return (images[:, 1:2] * 0 + images[:, :1]) / images[:, 1:2].amax((1, 2, 3), keepdim=True).ceil()


class Logits(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 20 * (images.mean(1, keepdim=True) - 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 64x64 and 48x96 pixels, white in their left half and black in the other."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(COUNT):
        height, width = ((64, 64), (48, 96))[number % 2]
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[:, : width // 2] = 255
        Image.fromarray(pixels).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text(f"picture {number}")
    return path


def script(module: nn.Module, path: Path) -> str:
    torch.jit.trace(module, torch.rand(2, 3, 32, 32), strict=False).save(str(path))
    return str(path)


def prepare(folder: Path, out: Path, *words: str) -> int:
    return main(["--source", str(folder), "--out", str(out), *SMALL, *words])


def maps_of(out: Path) -> dict[str, np.ndarray]:
    found = {}
    for split in json.loads((out / "index.json").read_text())["splits"]:
        shards = ShardSet.open(out, split)
        for index in range(shards.num_samples):
            batch, bucket = shards.batch([index]), shards.buckets[shards.bucket_of(index)]
            found[batch.captions[0]] = batch.saliency[0].reshape(bucket.grid).numpy()
    return found


def check_halves(out: Path, edge: float = 0.15) -> None:
    found = maps_of(out)
    assert len(found) == COUNT
    for saliency in found.values():
        half = saliency.shape[1] // 2
        np.testing.assert_allclose(saliency[:, :half], 1, atol=edge)
        np.testing.assert_allclose(saliency[:, half:], 0, atol=edge)


@pytest.mark.parametrize("words", [(), ("--buckets", "32x32,32x64")])
@pytest.mark.parametrize("size", ["", "size=24,"])
def test_torchscript(words: tuple[str, ...], size: str, folder: Path, tmp_path: Path) -> None:
    model = script(Brightness(), tmp_path / "net.pt")
    text = f"model:path={model},{size}normalise=none,output=1,channel=1"
    assert prepare(folder, tmp_path / "out", "--saliency", text, *words) == 0
    check_halves(tmp_path / "out")
    assert prepare(folder, tmp_path / "not", "--saliency", text.replace("channel=1", "channel=0,invert=yes")) == 0
    check_halves(tmp_path / "not")


def test_exported_program(folder: Path, tmp_path: Path) -> None:
    program = torch.export.export(OneAtATime(), (torch.rand(1, 3, 32, 32),))
    torch.export.save(program, tmp_path / "net.pt2")
    text = f"model:path={tmp_path / 'net.pt2'},normalise=none"
    assert prepare(folder, tmp_path / "out", "--saliency", f"{text},batch=1") == 0
    check_halves(tmp_path / "out")


def test_onnx(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_bytes(sigmoid_model(4, 16))  # takes 4 images of 16 x 16 and no others
    text = f"model:path={tmp_path / 'net.onnx'},batch=4,size=16,channel=2,mean=0.5/0.5/0.5,std=0.1/0.1/0.1"
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 0
    check_halves(tmp_path / "out")


def test_onnx_without_onnxruntime(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def blocked(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", blocked)
    (tmp_path / "net.onnx").write_bytes(sigmoid_model(4, 16))
    assert prepare(folder, tmp_path / "out", "--saliency", f"model:path={tmp_path / 'net.onnx'}") == 2
    assert "needs onnxruntime; pip install 'sharpmoe[onnx]'" in capsys.readouterr().err


def test_logits_need_an_activation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"model:path={script(Logits(), tmp_path / 'net.pt')},normalise=none"
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 2
    assert "gives values from -10 to 10, expected 0 to 1; set activation=sigmoid" in capsys.readouterr().err
    assert prepare(folder, tmp_path / "other", "--saliency", f"{text},activation=sigmoid") == 0
    check_halves(tmp_path / "other")


def test_maps_that_are_not_finite_leave_their_pictures_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "3.png")
    Image.new("RGB", (64, 64), "white").save(folder / "4.png")
    text = f"model:path={script(Infinite(), tmp_path / 'net.pt')},normalise=none"
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 0
    output = capsys.readouterr()
    assert "skipped 3.png: its saliency map is not finite" in output.err
    assert "flat      1 of 11 saliency maps are the same everywhere" in output.out
    assert len(maps_of(tmp_path / "out")) == COUNT - 1
    assert prepare(folder, tmp_path / "strict", "--saliency", text, "--max-bad-share", "0.01") == 2
    assert "its saliency map is not finite" in capsys.readouterr().err
    assert prepare(folder, tmp_path / "dry", "--saliency", text, "--dry-run") == 0
    assert "tried and left out: 3.png: its saliency map is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("output=7", "has 2 outputs, and output 7 is no tensor"),
        ("output=1,channel=2", "output 1 has shape (8, 2, 32, 32) for 8 images; expected (B, h, w), or (B, C, h, w)"),
    ],
)
def test_outputs_that_do_not_fit(
    options: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"model:path={script(Brightness(), tmp_path / 'net.pt')},normalise=none,{options}"
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


@pytest.mark.parametrize("name", ["net.pt", "net.pt2", "net.onnx"])
def test_files_that_are_no_model(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    torch.save({"weight": torch.zeros(3)}, tmp_path / name)
    assert prepare(folder, tmp_path / "out", "--saliency", f"model:path={tmp_path / name}") == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_the_file_s_hash_and_the_options_are_the_identity(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"model:path={script(Brightness(), tmp_path / 'net.pt')},normalise=none,output=1,channel=1"
    assert prepare(folder, tmp_path / "out", "--saliency", text) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "net.pt").rename(tmp_path / "elsewhere" / "net.pt")
    moved = text.replace("net.pt", "elsewhere/net.pt")
    assert prepare(folder, tmp_path / "out", "--saliency", moved) == 0  # the same file elsewhere
    assert "was complete, nothing to do" in capsys.readouterr().out
    assert prepare(folder, tmp_path / "out", "--saliency", f"{moved},size=16") == 2
    assert "was prepared with saliency.size = None, now asked for 16" in capsys.readouterr().err
    with (tmp_path / "elsewhere" / "net.pt").open("ab") as file:
        file.write(b"\0")
    assert prepare(folder, tmp_path / "out", "--saliency", moved) == 2
    assert "was prepared with saliency.sha256 = " in capsys.readouterr().err
    assert prepare(folder, tmp_path / "plain") == 0
    both = [str(tmp_path / name) for name in ("out", "plain")]
    assert shards_main(["merge", str(tmp_path / "both"), *both, "--quiet"]) == 2
    assert "wrong saliency" in capsys.readouterr().err
    assert shards_main(["stats", both[0]]) == 0
    assert "saliency   kind model (file net.pt, sha256 " in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()  # no machine paths


def test_ranks_and_resuming_change_nothing(folder: Path, tmp_path: Path) -> None:
    text = f"model:path={script(Brightness(), tmp_path / 'net.pt')},normalise=none,output=1,channel=1,batch=3"
    words = ("--source", str(folder), *SMALL, "--saliency", text, "--shard-samples", "4")
    recipe = recipe_of(vars(main.parse(words)))

    def prepare_rank(name: str, place: Rank, threads: int = 1) -> None:
        source = open_source(SourceOptions(source=str(folder)))
        prepare_shards(source, tmp_path / name, recipe, Machine("cpu", threads, place, False))

    prepare_rank("one", Rank())
    prepare_rank("resumed", Rank(), threads=3)
    for path in [*(tmp_path / "resumed").glob("train-00001.*"), tmp_path / "resumed" / "index.json"]:
        path.unlink()
    prepare_rank("resumed", Rank())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: prepare_rank("two", Rank(rank, 2)), range(2)))
    files = [path.name for path in (tmp_path / "one").iterdir() if path.suffix in (".tar", ".json")]
    assert len([name for name in files if name.endswith(".tar")]) >= 3
    for name in files:
        content = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() == content
