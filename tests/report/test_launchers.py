"""Sampling, evaluation and the report of a run folder, from the command line, on a small real shard set."""

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.read.shards import ShardSet
from launcher import evaluate, report, sample
from sharpmoe.config import CheckpointConfig, DataConfig, LogConfig, RunConfig, SampleConfig, TrainConfig
from sharpmoe.config_io import dump_run_config
from sharpmoe.errors import CheckpointError, ConfigError, DataError
from sharpmoe.evaluation import allocation
from sharpmoe.evaluation.held_out import ALONE
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.report import samples
from sharpmoe.report.runs import find_source
from sharpmoe.train.monitor import look, look_before, make_looks
from sharpmoe.train.runlog import RunLog, read_log
from tests.fixtures_data import make_shards
from tests.toys import toy_config, toy_model

WIDTHS = {"text_width": 32, "pooled_width": 32}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint of random weights; EMA and live differ."""
    root = tmp_path_factory.mktemp("work")
    shards = make_shards(root / "shards")
    model = toy_model("diffmoe", **WIDTHS)
    run = RunConfig(
        name="toy",
        output=str(root),
        model=model.config,
        data=DataConfig(shards=str(shards)),
        sample=SampleConfig(captions=("a red circle", "a blue square"), num_steps=2),
        log=LogConfig(validate_every=1, validation_images=3, sample_every=1, allocation_images=3),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig(every=0, init="base.safetensors"),
    )
    checkpoint = root / "toy" / "checkpoints" / "step00000002"
    save_weights(checkpoint / "ema.safetensors", model.state_dict(), model.config)
    with torch.no_grad():
        model.final_layer.linear.bias.add_(0.5)
    save_weights(checkpoint / "live.safetensors", model.state_dict(), model.config)
    (root / "toy" / "checkpoints" / "latest").write_text("step00000002\n")
    (root / "toy" / "config.yaml").write_text(dump_run_config(run))
    return root / "toy"


def look_at(run_folder: Path) -> RunLog:
    """Do everything a run of two steps is looked at with."""
    source = find_source(run_folder)
    run, (model, _) = source.run, load_model(source.weights)
    log = RunLog(run_folder, 2, stream=io.StringIO())
    held_out = ShardSet.open(run.data.shards, "unseen")
    looks = make_looks(run, held_out, run_folder, torch.device("cpu"), ALONE, log)
    look_before(looks, lambda: model)
    look(looks, lambda: model, 1)
    look(looks, lambda: model, 2)
    log.close()
    return log


def test_captions_become_pictures(run_folder: Path, tmp_path: Path) -> None:
    argv = [str(run_folder), "--captions", "a green circle", "a Red / cross!", "--steps", "2", "--out", str(tmp_path)]
    assert sample.main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000_a-green-circle.png",
        "001_a-red-cross.png",
        "grid.png",
    ]
    with Image.open(tmp_path / "000_a-green-circle.png") as image:
        assert image.size == (32, 32)


def test_parts_draw_what_one_process_draws(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["a green circle", "a red cross", "a blue square, large", "a circle", "a cross"]
    words = [str(run_folder), "--captions", *captions, "--steps", "2", "--batch-size", "2", "--out"]
    assert sample.main([*words, str(tmp_path / "whole")]) == 0
    for part in ("1/4", "2/4", "3/4", "4/4"):
        assert sample.main([*words, str(tmp_path / "parts"), "--part", part]) == 0
    assert "part 1 of 4: nothing to draw" in capsys.readouterr().out
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name != "grid.png"}
    parts = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert len(whole) == 5
    assert {name: parts[name] for name in whole} == whole
    assert parts.keys() - whole.keys() == {"grid_part2of4.png", "grid_part3of4.png", "grid_part4of4.png"}
    assert sample.main([*words, str(tmp_path), "--part", "5/4"]) == 2


def test_pictures_in_a_resolution_of_the_shards(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(tmp_path / "shards", buckets="16x64")
    argv = [str(run_folder), "--shards", str(shards), "--captions", "a red circle", "--steps", "2"]
    assert sample.main([*argv, "--bucket", "16x64", "--out", str(tmp_path / "out")]) == 0
    assert {Image.open(path).size for path in (tmp_path / "out").glob("000*.png")} == {(64, 16)}
    assert sample.main([*argv, "--bucket", "32x32"]) == 2
    assert "--bucket 32x32: " in capsys.readouterr().err


def test_the_run_says_what_is_not_said(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "samples" / "drawn" / "grid.png")
    assert (run_folder / "samples" / "drawn" / "001_a-blue-square.png").is_file()


def test_captions_from_a_file_and_weights_by_kind_and_path(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\n\n  a blue square \n")
    latest = run_folder / "checkpoints" / "step00000002"
    drawn = {}
    for name, model in {"ema": [str(run_folder)], "live": [str(run_folder), "--weights", "live"]}.items():
        out = tmp_path / name
        assert sample.main([*model, "--captions-file", str(file), "--out", str(out)]) == 0
        drawn[name] = (out / "grid.png").read_bytes()
    assert drawn["ema"] != drawn["live"]
    for model in (latest, latest / "ema.safetensors"):
        assert sample.main([str(model), "--captions-file", str(file), "--out", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / "grid.png").read_bytes() == drawn["ema"]


def test_evaluate_compares_two_models(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = run_folder / "checkpoints" / "step00000002" / "live.safetensors"
    argv = [str(run_folder), str(live), "--images", "3", "--sheet-images", "2", "--out", str(tmp_path)]
    assert evaluate.main(argv) == 0
    assert "change (paired)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "after.json",
        "allocation.png",
        "before.json",
        "routing_after.png",
        "routing_before.png",
    ]
    assert allocation.load(tmp_path / "after.json").flow != allocation.load(tmp_path / "before.json").flow


def test_looking_at_a_run_leaves_pictures_figures_and_a_page(run_folder: Path) -> None:
    log = look_at(run_folder)
    names = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*.png")}
    expected = {f"{kind}/step{step:08}.png" for kind in ("samples", "routing") for step in (0, 1, 2)}
    assert expected | {"allocation/allocation.png"} <= names
    assert "change (paired)" in log.progress.stream.getvalue()
    assert list(read_log(run_folder / "log.jsonl")["validation/flow"]) == [1, 2]
    assert report.main([str(run_folder)]) == 0
    page = (run_folder / "report.html").read_text()
    linked = re.findall(r'src="([^"]+\.png)"', page)
    assert set(linked) == expected
    assert all((run_folder / path).is_file() for path in linked)
    assert "change (paired)" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: neither a run folder with checkpoints/latest nor a .safetensors file"),
        (["RUN", "--captions-file", "nowhere.txt"], "nowhere.txt: cannot be read as a caption file"),
        (["RUN", "--steps", "0"], "sample.num_steps: Input should be greater than or equal to 1, got 0"),
        (["RUN", "--shards", "nowhere"], "nowhere: no index.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    run_folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main([str(run_folder) if word == "RUN" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_weights_that_are_gone_and_models_of_other_shards(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such weights file"):
        find_source(tmp_path / "gone.safetensors")
    shards = ShardSet.open(find_source(run_folder).run.data.shards, "train")
    with pytest.raises(DataError, match="text widths"):
        samples.check_shards(toy_model(), shards)
    with pytest.raises(ConfigError, match="class-conditional"):
        samples.request(toy_config(conditioning="class"), shards, samples.Wish(("a cat",)))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="holds no captions"):
        samples.read_captions(empty)


def test_a_report_needs_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no log.jsonl" in capsys.readouterr().err


def test_a_class_conditional_model_is_drawn_by_label(run_folder: Path, tmp_path: Path) -> None:
    model = toy_model("tc", conditioning="class", num_classes=4)
    save_weights(tmp_path / "class.safetensors", model.state_dict(), model.config)
    shards = find_source(run_folder).run.data.shards
    argv = [str(tmp_path / "class.safetensors"), "--labels", "0", "3", "--shards", shards, "--steps", "2"]
    assert sample.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "001_class-3.png").is_file()
