"""The run file that convert.py writes: the architecture of the weights, settings of the recipes, and it trains."""

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from launcher.convert import main
from sharpmoe.config import RunConfig
from sharpmoe.config_io import PROJECT_ROOT, load_run_config
from sharpmoe.log_file import read_log
from sharpmoe.model.published.run_file import _model_section
from sharpmoe.model.weights import check_architecture, read_weights
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.model.published.test_load import NAMES, load
from tests.toys import toy_config
from tests.train.setting import plan_for


def convert(name: str, folder: Path, *words: str) -> Path:
    """Convert recorded published weights; return the run file. Their models have a head width of 8."""
    _, weights, family, router, _ = load(name)
    save_file(weights, folder / "published.safetensors")
    heads = weights["x_embedder.proj.weight"].shape[0] // 8
    given = ["--family", family, "--router", router, "--num-heads", str(heads), "--latent-size", "8", *words]
    files = [str(folder / "published.safetensors"), str(folder / "ours.safetensors")]
    assert main([*files, *given, "--config", str(folder / "run.yaml")]) == 0
    return folder / "run.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_that_of_the_weights_with_saliency_routers(name: str, tmp_path: Path) -> None:
    run = load_run_config(convert(name, tmp_path))
    _, config, _ = read_weights(tmp_path / "ours.safetensors")
    check_architecture(config, run.model, "ours")
    assert run.model.saliency_router == config.family.has_experts
    assert run.checkpoint.init == str(tmp_path / "ours.safetensors")
    assert (run.name, run.stage) == ("run", "posttrain")
    assert run.loss.routing_weight == (0.001 if config.family.varies_compute else 0.0)


@pytest.mark.parametrize("router", ["dense", "tc", "ec", "diffmoe", "promoe_tc", "promoe_ec", "dsmoe", "dit_moe"])
def test_a_model_section_names_what_differs_and_nothing_else(router: str) -> None:
    fields = {"conditioning": "class", "num_classes": 7, "saliency_router": False, "learn_sigma": True}
    config = toy_config(router, **fields)
    section = _model_section(config)
    assert "expert_hidden" not in section
    assert "time_scale" not in section
    built = RunConfig.model_validate({"model": section}).model
    assert built.model_copy(update={"saliency_router": False}) == config


def test_the_settings_are_those_of_the_recipes(tmp_path: Path) -> None:
    run = load_run_config(convert("published_promoe_ec", tmp_path, "--shards", "data/other"))
    recipe = load_run_config(PROJECT_ROOT / "configs/runs/imagenet256/ec_b_sharp.yaml")
    for section in ("rollout", "loss", "optim", "train", "log", "sample"):
        assert getattr(run, section) == getattr(recipe, section), section
    assert run.data.shards == "data/other"


@pytest.mark.parametrize("name", ["published_promoe_ec", "published_sit"])
def test_the_header_has_the_measured_settings_where_compute_varies(name: str, tmp_path: Path) -> None:
    path = convert(name, tmp_path)
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    words = shlex.split(header.partition("as words for the command:")[2].replace("#", " "))
    run, recipe = load_run_config(path, words), load_run_config(PROJECT_ROOT / "configs/runs/quickstart.yaml")
    if run.model.family.varies_compute:
        scales = {name: getattr(recipe.loss, name) for name in ("saliency_scale", "mass_scale")}  # found when it starts
        assert run.loss.model_copy(update=scales) == recipe.loss
        assert run.optim.lr_scale == recipe.optim.lr_scale
        assert run.rollout.noise == recipe.rollout.noise
    else:
        assert not words


def test_an_existing_run_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    words = [str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--config", str(tmp_path / "run.yaml")]
    assert main(words) == 2
    assert "exists, and a run file is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_without_a_row_for_no_class_nothing_is_dropped_or_guided(tmp_path: Path) -> None:
    _, weights, *_ = load("published_sit")
    rows = len(weights["y_embedder.embedding_table.weight"])
    run = load_run_config(convert("published_sit", tmp_path, "--num-classes", str(rows)))
    assert (run.rollout.caption_dropout, run.sample.cfg_scale) == (0.0, 1.0)
    assert not run.model.class_dropout


def test_a_model_extended_to_text_needs_data_with_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--text-width", "12"]
    with pytest.raises(AssertionError):
        convert("published_sit", tmp_path, *words)
    assert "needs --shards: prepared data with captions" in capsys.readouterr().err
    run = load_run_config(convert("published_sit", tmp_path, *words, "--shards", "data/own"))
    assert (run.model.conditioning, run.model.text_width, run.model.pooled_width) == ("text", 12, 12)
    assert run.data.shards == "data/own"


def train(world: World, path: Path, folder: Path) -> None:
    words = {
        "output": folder, "data.shards": folder / "shards", "data.num_workers": 0, "train.steps": 2,
        "train.global_batch": 4, "train.precision": "fp32", "rollout.num_steps": 2, "log.every": 1,
        "log.validate_every": 0, "log.validation_images": 4, "log.allocation": "false",
    }  # fmt: skip
    run = load_run_config(path, [word for key, value in words.items() for word in (f"--{key}", str(value))])
    loop.train(plan_for(run, world), world)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["published_promoe_ec", "published_kwai_tc_shared"])
def test_two_steps_are_trained_from_it(name: str, tmp_path: Path) -> None:
    path = convert(name, tmp_path)
    assert yaml.safe_load(path.read_text())["train"]["steps"] == 100_000
    make_shards(tmp_path / "shards")
    run_ranks(train, 1, path, tmp_path)
    flow = read_log(tmp_path / "run" / "log.jsonl")["loss/flow"]
    assert sorted(flow) == [1, 2]
    assert torch.tensor(list(flow.values())).isfinite().all()
