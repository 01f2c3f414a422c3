"""Every file in configs/ can be run as it stands."""

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from sharpmoe.config import RunConfig
from sharpmoe.config_io import DEFAULT_RUN_CONFIG, dump_run_config, load_run_config
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import read_weights
from sharpmoe.parallel.zero.config import _read_ds_json, resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / "configs" / "runs").rglob("*.yaml"))
IMAGENET = sorted((ROOT / "configs" / "runs" / "imagenet256").glob("*.yaml"))
MILLIONS = {  # the published parameter counts (tests/model/test_dit.py), by run file
    "tc_s": 82.608, "tc_b": 328.891, "tc_l": 1163.274, "ec_s": 82.608, "ec_b": 328.891, "ec_l": 1163.274,
    "diffmoe_s": 83.513, "diffmoe_b": 332.472, "diffmoe_l": 1981.962,
    # counted here: their repository gives sizes (configs/004_ProMoE_*.yaml) and no counts
    "promoe_tc_s": 75.544, "promoe_tc_b": 300.608, "promoe_tc_l": 1062.685,
    "promoe_ec_s": 75.544, "promoe_ec_b": 300.608, "promoe_ec_l": 1062.685,
}  # fmt: skip
ENGINES = sorted((ROOT / "configs").glob("zero*.json"))
HEADER = ("# Question", "# Paper", "# Cost", "# Command", "# Expected")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_file_is_a_lab_note_that_loads(path, tmp_path):
    run = load_run_config(path)
    assert run.name == path.stem
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert [word for word in HEADER if not any(line.startswith(word) for line in head)] == []
    (tmp_path / "resolved.yaml").write_text(dump_run_config(run), encoding="utf-8")
    assert load_run_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize("engine", ENGINES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_engine_file_fits_every_run_file(path, engine, world):
    resolved = resolve_ds_config(engine, load_run_config(path), world)
    # DeepSpeed asks torch.distributed for the world size and finds one rank here.
    triple = {"train_batch_size": resolved["train_batch_size"] // world}
    parsed = DeepSpeedConfig(resolved | triple)
    assert parsed.zero_optimization_stage == int(engine.stem.removeprefix("zero"))


@pytest.mark.parametrize("engine", ENGINES, ids=lambda path: path.stem)
def test_engine_files_hold_engine_keys_only(engine):
    assert set(_read_ds_json(engine)) == {"zero_optimization"}


def test_zero3_gathers_a_rollout_once():
    """The limits must be at least the size of any shipped model, or a step gathers all parameters several times."""
    zero = _read_ds_json(ROOT / "configs" / "zero3.json")["zero_optimization"]
    assert min(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) >= 3_000_000_000


def comparable(name: str) -> RunConfig:
    run = load_run_config(ROOT / "configs" / "runs" / f"{name}.yaml")
    model = run.model.model_copy(update={"saliency_router": True})
    return run.model_copy(update={"name": "", "model": model, "loss": RunConfig().loss})


@pytest.mark.parametrize("name", ["posttrain-router", "posttrain-paper", "posttrain-counts"])
def test_the_post_training_runs_differ_in_router_and_routing_loss_only(name):
    assert comparable(name) == comparable("posttrain-plain")


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_imagenet_recipes_have_the_published_size_and_the_papers_settings(path):
    run = load_run_config(path)
    posttrain = path.stem.endswith("_sharp")
    with torch.device("meta"):
        total, _ = build_model(run.model.model_copy(update={"saliency_router": False})).count_parameters()
    assert round(total / 1e6, 3) == MILLIONS[path.stem.removesuffix("_sharp")]
    assert (run.stage, run.train.steps) == (("posttrain", 100_000) if posttrain else ("pretrain", 500_000))
    assert run.model.saliency_router == posttrain
    assert (run.train.global_batch, run.optim.lr, run.optim.betas) == (256, 1e-4, (0.9, 0.999))
    assert (run.optim.weight_decay, run.optim.ema_decay, run.rollout.num_steps) == (0, 0.9999, 10)
    assert (run.sample.num_steps, run.sample.cfg_scale) == (250, 1.5)
    if posttrain:
        base = load_run_config(path.with_stem(path.stem.removesuffix("_sharp")))
        assert run.model.model_copy(update={"saliency_router": False}) == base.model
        assert run.checkpoint.init == f"runs/{base.name}/checkpoints/step{base.train.steps:08}/ema.safetensors"
        assert run.loss.routing_weight == (0.001 if run.model.family.varies_compute else 0.0)


def test_every_imagenet_recipe_is_there():
    assert {path.stem for path in IMAGENET} == {name + end for name in MILLIONS for end in ("", "_sharp")}


def test_quickstart_is_the_default():
    assert DEFAULT_RUN_CONFIG.stem == "quickstart"
    assert load_run_config(None).name == "quickstart"


def test_the_shipped_base_is_small_and_fits_quickstart():
    run = load_run_config(None)
    path = ROOT / str(run.checkpoint.init)
    assert path.stat().st_size < 10_000_000
    _, config, _ = read_weights(path)
    assert config.model_copy(update={"saliency_router": True}) == run.model
