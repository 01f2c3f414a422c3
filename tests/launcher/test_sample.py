"""Images for captions and labels, from the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import launcher.sample
from data_pipeline.encode.like import origin_header
from data_pipeline.read.shards import ShardSet
from launcher.sample import main
from sharpmoe.config_io import PROJECT_ROOT
from sharpmoe.evaluation.adm import draw_adm_batch
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.weights import read_weights, save_weights
from sharpmoe.report.page import write_report
from sharpmoe.report.runs import find_saved_model
from tests.fixtures_data import make_shards
from tests.report.run_folder import make_run_folder
from tests.toys import toy_model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("work"))


def test_captions_become_pictures(run_folder: Path, tmp_path: Path) -> None:
    argv = [str(run_folder), "--captions", "a green circle", "a Red / cross!", "--steps", "2", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_a-green-circle.png",
        "001_a-red-cross.png",
        "grid.png",
    ]
    with Image.open(tmp_path / "000_a-green-circle.png") as image:
        assert image.size == (32, 32)


def test_a_second_call_into_a_folder_loses_no_picture(run_folder: Path, tmp_path: Path) -> None:
    def names(*more: str) -> set[str]:
        assert main([str(run_folder), "--captions", "a", "--steps", "1", "--out", str(tmp_path), *more]) == 0
        return {path.name for path in tmp_path.iterdir()}

    assert names() == names() == {"000_a.png", "grid.png"}
    first = (tmp_path / "grid.png").read_bytes()
    assert names("--seed", "7") == {"000_a.png", "grid.png", "000_a_2.png", "grid_2.png"}
    assert (tmp_path / "grid.png").read_bytes() == first


def test_parts_draw_what_one_process_draws(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["a green circle", "a red cross", "a blue square, large", "a circle", "a cross"]
    words = [str(run_folder), "--captions", *captions, "--steps", "2", "--batch-size", "2", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    for part in ("1/4", "2/4", "3/4", "4/4"):
        assert main([*words, str(tmp_path / "parts"), "--part", part]) == 0
    assert "part 1 of 4: nothing to draw" in capsys.readouterr().out
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name != "grid.png"}
    parts = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert len(whole) == 5
    assert {name: parts[name] for name in whole} == whole
    assert parts.keys() - whole.keys() == {"grid_part2of4.png", "grid_part3of4.png", "grid_part4of4.png"}
    assert main([*words, str(tmp_path), "--part", "5/4"]) == 2


def test_the_settings_of_a_published_pipeline(run_folder: Path, tmp_path: Path) -> None:
    words = [str(run_folder), "--captions", "a green circle", "--steps", "2", "--cfg-scale", "4", "--out"]
    options: dict[str, list[str]] = {
        "plain": [],
        "shift": ["--shift", "tokens"],
        "three": ["--shift", "3"],
        "norm": ["--cfg-norm", "tokens"],
        "interval": ["--cfg-interval", "0.2", "0.6"],
        "weak": ["--weak-model", str(run_folder), "--weights", "live"],
    }
    for name, more in options.items():
        assert main([*words, str(tmp_path / name), *more]) == 0
    pictures = {(tmp_path / name / "000_a-green-circle.png").read_bytes() for name in options}
    assert len(pictures) == len(options)


@pytest.mark.parametrize(
    "words", [["--shift", "0"], ["--shift", "all"], ["--cfg-interval", "0.6", "0.2"], ["--cfg-interval", "0", "2"]]
)
def test_settings_out_of_bounds_are_one_line(
    words: list[str], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), "--captions", "a cross", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["--width", "64", "--height", "16"], (64, 16)),
        (["--width", "56", "--height", "80"], (56, 80)),
        (["--width", "48"], (48, 32)),
        (["--height", "24"], (32, 24)),
        ([], (32, 32)),
    ],
)
def test_pictures_of_any_width_and_height(
    words: list[str], size: tuple[int, int], run_folder: Path, tmp_path: Path
) -> None:
    argv = [str(run_folder), "--captions", "a red circle", "a cross", "--steps", "2", "--out", str(tmp_path)]
    assert main([*argv, *words]) == 0
    assert {Image.open(path).size for path in tmp_path.glob("00*.png")} == {size}


def test_pictures_of_shards_without_the_square_of_the_model(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "shards", buckets="16x64")
    argv = [str(run_folder), "--shards", str(shards), "--captions", "a red circle", "--steps", "2"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "000_a-red-circle.png").size == (32, 32)
    assert "the shards have 16x64 (H x W pixels): in sizes that a model was not trained on" in capsys.readouterr().err
    assert main([*argv, "--width", "64", "--height", "16", "--out", str(tmp_path / "out")]) == 0
    assert "trained" not in capsys.readouterr().err


def test_the_run_says_what_is_not_said(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "samples" / "drawn" / "grid.png")
    assert (run_folder / "samples" / "drawn" / "001_a-blue-square.png").is_file()


def test_captions_from_a_file_and_weights_by_kind_and_path(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\n\n  a blue square \n")
    latest = run_folder / "checkpoints" / "step00000002"
    drawn = {}
    for name, model in {"ema": [str(run_folder)], "live": [str(run_folder), "--weights", "live"]}.items():
        out = tmp_path / name
        assert main([*model, "--captions-file", str(file), "--out", str(out)]) == 0
        drawn[name] = (out / "grid.png").read_bytes()
    assert drawn["ema"] != drawn["live"]
    for model in (latest, latest / "ema.safetensors"):
        assert main([str(model), "--captions-file", str(file), "--out", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / "grid.png").read_bytes() == drawn["ema"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: neither a run folder with checkpoints/latest nor a .safetensors file"),
        (["RUN", "--captions-file", "nowhere.txt"], "nowhere.txt: cannot be read as a caption file"),
        (["RUN", "--steps", "0"], "--steps: got '0', allowed: a whole number >= 1"),
        (["RUN", "--shards", "nowhere"], "nowhere: no index.json"),
        (["RUN", "--width", "60"], "width 60: not a multiple of 8 (pixels of a token: codec 4 x patch 2); take 64"),
        (["RUN", "--height", "3"], "height 3: not a multiple of 8 (pixels of a token: codec 4 x patch 2); take 8"),
        (
            ["RUN", "--width", "8000000"],
            "32 x 8000000 pixels (H x W): 4000000 tokens, at most 1024 (the model's square has 16); ",
        ),
        (["RUN", "--width", "2056"], "32 x 2056 pixels (H x W): 1028 tokens, at most 1024"),
        (["RUN", "--labels", "3"], "the model is text-conditional, got label 3; give captions"),
        (["RUN", "--height", "0"], "--height: got '0', allowed: a whole number >= 1"),
        (
            ["RUN", "--npz", "a.npz", "--width", "64"],
            "--width has no effect with --npz, which draws the square of the model",
        ),
        (["RUN", "--cuda-graphs"], "CUDA graphs: the model is on the cpu, expected cuda; leave out CUDA graphs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    run_folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder) if word == "RUN" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_class_conditional_model_is_drawn_by_label(run_folder: Path, tmp_path: Path) -> None:
    model = toy_model("tc", conditioning="class", num_classes=4)
    save_weights(tmp_path / "class.safetensors", model.state_dict(), model.config)
    shards = find_saved_model(run_folder).run.data.shards
    argv = [str(tmp_path / "class.safetensors"), "--labels", "0", "3", "--shards", shards, "--steps", "2"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "001_class-3.png").is_file()


def test_the_command_writes_batch_and_protocol(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(tmp_path / "toy.safetensors", model.state_dict(), model.config)
    words = ["--shards", str(shards), "--npz", str(tmp_path / "batch.npz"), "--num", "5", "--steps", "2"]
    assert main([str(tmp_path / "toy.safetensors"), *words, "--cfg-scale", "1.0", "--batch-size", "4"]) == 0
    with np.load(tmp_path / "batch.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 3)
    protocol = json.loads((tmp_path / "batch.json").read_text())
    assert (protocol["cfg_scale"], protocol["grid"]) == (1.0, "linspace(1, 0, 2 + 1), 1 is noise")
    assert protocol["dtype"] == "float32"
    weak = [
        "--cfg-scale",
        "2",
        "--shift",
        "3",
        "--weak-model",
        str(tmp_path / "toy.safetensors"),
        "--cfg-norm",
        "tokens",
    ]
    words[3] = str(tmp_path / "weak.npz")
    assert main([str(tmp_path / "toy.safetensors"), *words, *weak]) == 0
    protocol = json.loads((tmp_path / "weak.json").read_text())
    assert (protocol["weak_model"], protocol["cfg_norm"]) == ("toy", "tokens")
    assert protocol["grid"].endswith("shifted: s t / (1 + (s - 1) t) with s = 3")


def test_a_model_draws_in_bfloat16_and_the_protocol_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = list[torch.dtype]()

    def noted(model: Backbone, sample: Any, decode: Any, batch: Any, weak: Backbone) -> Path:
        dtypes.extend(next(each.parameters()).dtype for each in (model, weak))
        return draw_adm_batch(model, sample, decode, batch, weak)

    monkeypatch.setattr(launcher.sample, "draw_adm_batch", noted)
    shards = make_shards(tmp_path / "shards")
    model = toy_model("diffmoe", conditioning="class", num_classes=3)
    save_weights(tmp_path / "toy.safetensors", model.state_dict(), model.config)
    words = [str(tmp_path / "toy.safetensors"), "--shards", str(shards), "--num", "4", "--steps", "2"]
    for dtype in ("float32", "bfloat16"):
        weak = ["--weak-model", words[0], "--cfg-scale", "2", "--dtype", dtype]
        assert main([*words, *weak, "--npz", str(tmp_path / f"{dtype}.npz")]) == 0
    assert json.loads((tmp_path / "bfloat16.json").read_text())["dtype"] == "bfloat16"
    with np.load(tmp_path / "float32.npz") as exact, np.load(tmp_path / "bfloat16.npz") as rounded:
        far = np.abs(exact["arr_0"].astype(int) - rounded["arr_0"])
    assert 0 < far.mean() < 8  # levels of 256
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_parts_join_to_the_batch_of_one_process(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    model = toy_model("ec", conditioning="class", num_classes=3)
    save_weights(tmp_path / "toy.safetensors", model.state_dict(), model.config)
    common = [str(tmp_path / "toy.safetensors"), "--shards", str(shards), "--num", "7", "--steps", "2"]
    words = [*common, "--batch-size", "2", "--npz"]
    parts = str(tmp_path / "parts.npz")
    assert main([*words, str(tmp_path / "whole.npz")]) == 0
    assert main([*words, parts, "--part", "1/3"]) == main([*words, parts, "--part", "2/3"]) == 0
    assert main([*words, parts, "--join", "3"]) == 2  # one is missing
    assert not (tmp_path / "parts.npz").exists()
    assert main([*words, parts, "--part", "3/3"]) == main([*words, parts, "--join", "3"]) == 0
    with np.load(tmp_path / "whole.npz") as whole, np.load(parts) as joined:
        assert (whole["arr_0"] == joined["arr_0"]).all()
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "parts.json").read_text()


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (["--seed", "3"], "parts.part2of2.npz: was drawn with seed 3, this call or another part says 0"),
        (["--dtype", "bfloat16"], "was drawn with dtype 'bfloat16', this call or another part says 'float32'"),
        (["--batch-size", "1"], "was drawn with batch_size 1, this call or another part says 2"),
    ],
)
def test_parts_that_were_drawn_in_different_ways_are_not_joined(
    tmp_path: Path, drawn: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, parts = _class_model(tmp_path)
    assert main([*words, parts, "--part", "1/2"]) == main([*words, parts, "--part", "2/2", *drawn]) == 0
    assert main([*words, parts, "--join", "2"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "parts.npz").exists()


def test_parts_of_different_weights_are_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, parts = _class_model(tmp_path)
    assert main([*words, parts, "--part", "1/2"]) == 0
    _class_model(tmp_path, seed=1)
    assert main([*words, parts, "--part", "2/2"]) == 0
    assert main([*words, parts, "--join", "2"]) == 2
    assert "parts.part2of2.npz: was drawn with weights_sha256 " in capsys.readouterr().err


def _class_model(folder: Path, seed: int = 0) -> tuple[list[str], str]:
    """Write a class-conditional model; return words that draw four of its images in batches of two, and an .npz."""
    shards = folder / "shards"
    if not shards.exists():
        make_shards(shards)
    model = toy_model("ec", conditioning="class", num_classes=3)
    with torch.no_grad():
        next(model.parameters()).add_(0.01 * seed)
    save_weights(folder / "toy.safetensors", model.state_dict(), model.config)
    words = [str(folder / "toy.safetensors"), "--shards", str(shards), "--num", "4", "--steps", "2"]
    return [*words, "--batch-size", "2", "--npz"], str(folder / "parts.npz")


def test_a_look_at_sampling_is_written_beside_the_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run_folder), "--captions", "a circle", "a cross", "--steps", "2"]
    assert main([*words, "--film", "2"]) == 0
    assert main([*words, "--counterfactual"]) == 0
    assert "share of choices that differ" in capsys.readouterr().out
    names = {path.name for path in (run_folder / "looks").iterdir()}
    assert names == {"film.png", "film.json", "counterfactual.png", "counterfactual.json"}
    (run_folder / "log.jsonl").write_text("")
    page, _ = write_report([run_folder])
    text = page.read_text(encoding="utf-8")
    assert all(f'alt="{name}"' in text for name in ("film", "counterfactual"))


@pytest.mark.parametrize("words", [["--film", "--part", "1/2"], ["--film", "--counterfactual"], ["--film", "0"]])
def test_a_look_that_cannot_be_drawn_is_one_line(
    run_folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_folder), "--captions", "a", "b", "--steps", "1", *words]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_weights_that_keep_their_codec_need_no_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run_folder(tmp_path / "made")
    saved = find_saved_model(folder)
    assert saved.run is not None
    shards = Path(saved.run.data.first_place)
    state, config, _ = read_weights(saved.weights)
    save_weights(saved.weights, state, config, origin_header(ShardSet.open(shards, "train")))  # as a run saves them
    drawn = ["--captions", "a cat", "--steps", "1", "--out"]
    assert main([str(folder), *drawn, str(tmp_path / "with")]) == 0
    shards.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)  # where the default, data/fluent64, is not either
    assert main([str(folder), *drawn, str(tmp_path / "without")]) == 0
    shown = capsys.readouterr()
    assert "no index.json" in shown.err + shown.out
    assert "codec and text encoder are those that" in shown.err + shown.out
    own = tmp_path / "copied.safetensors"
    shutil.copy(saved.weights, own)
    assert main([str(own), *drawn, str(tmp_path / "file")]) == 0
    pixels = {}
    for place in ("with", "without", "file"):
        with Image.open(tmp_path / place / "000_a-cat.png") as image:
            pixels[place] = np.asarray(image, dtype=int)
    assert np.array_equal(pixels["without"], pixels["file"])
    assert np.abs(pixels["with"] - pixels["file"]).max() <= 1  # shards pad the empty caption, which rounds another way
    assert main([str(own), *drawn, str(tmp_path / "none"), "--shards", str(shards)]) == 2
    assert f"{shards}: no index.json" in capsys.readouterr().err


SHIPPED = sorted((PROJECT_ROOT / "assets").rglob("*.safetensors"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_weights_draw_without_anything_else(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with safe_open(path, "pt") as file:
        model = json.loads(file.metadata()["model"])
    prompt = ["--captions", "a cat"] if model["conditioning"] == "text" else ["--labels", "3"]
    assert main([str(path), *prompt, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "grid.png").is_file()
