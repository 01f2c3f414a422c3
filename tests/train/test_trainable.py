"""Runs that train a part of the model: what is frozen stays bit for bit, has no state, and the run resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from launcher.export import main as export
from sharpmoe.config import RunConfig
from sharpmoe.errors import CheckpointError, ConfigError
from sharpmoe.log_file import read_log
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.trainable import freeze, trained_names
from sharpmoe.model.weights import load_model, save_weights
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.config import resolve_ds_config
from sharpmoe.train import loop
from sharpmoe.train.setup import initial_model, make_plan
from tests.distributed import run_ranks
from tests.parallel.reference import Case, assert_same, with_engine, with_plain_torch
from tests.selection import selected, sweep
from tests.train.setting import ALONE, identical, make_run, plan_for, stirred_model

ROUTERS = {"trainable": ["saliency_router", "gate", "capacity_predictor"]}
SALIENCY = {"trainable": ["saliency_router"]}
EXPERTS = {"trainable": ["moe.experts"]}
OTHERS = {"frozen": ["attn", "cross_attn", "experts"]}
CHECKPOINT, TWO_PASS = {"schedule": "checkpoint"}, {"schedule": "two_pass"}
SEGMENTS, HYBRID = {"schedule": "segments", "segment_steps": 1}, {"schedule": "hybrid", "kept_steps": 2}
CPU = {"device": "cpu"}
OFFLOADED = {"offload_optimizer": CPU, "offload_param": CPU}

# what is trained, rollout, ZeRO, ep_size, precision
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, str]] = {
    "saliency, recomputed": (SALIENCY, CHECKPOINT, {"stage": 3}, 1, "fp32"),
    "saliency, two passes": (SALIENCY, TWO_PASS, {"stage": 3}, 2, "bf16"),
    "saliency, zero2": (SALIENCY, CHECKPOINT, {"stage": 2}, 2, "bf16"),  # no group of experts
    "saliency, segments": (SALIENCY, SEGMENTS, {"stage": 3}, 1, "fp32"),
    "saliency, offloaded": (SALIENCY, CHECKPOINT, {"stage": 3, **OFFLOADED}, 2, "fp32"),
    "saliency, zero2 offloaded": (SALIENCY, {}, {"stage": 2, "offload_optimizer": CPU}, 1, "fp32"),
    "routers, recomputed": (ROUTERS, CHECKPOINT, {"stage": 3}, 2, "bf16"),
    "routers, hybrid": (ROUTERS, HYBRID, {"stage": 3}, 1, "bf16"),
    "experts, recomputed": (EXPERTS, CHECKPOINT, {"stage": 3}, 2, "fp32"),  # no group of other parameters
    "experts, segments": (EXPERTS, SEGMENTS, {"stage": 3}, 1, "bf16"),
    "experts, zero2": (EXPERTS, TWO_PASS, {"stage": 2}, 1, "fp32"),
    "experts, offloaded": (EXPERTS, TWO_PASS, {"stage": 3, **OFFLOADED}, 2, "bf16"),
    "others, recomputed": (OTHERS, CHECKPOINT, {"stage": 3}, 2, "bf16"),
    "others, zero2": (OTHERS, HYBRID, {"stage": 2}, 2, "fp32"),
    "others, offloaded": (OTHERS, CHECKPOINT, {"stage": 3, **OFFLOADED}, 1, "fp32"),
}
USUAL = ("saliency, recomputed", "saliency, zero2", "experts, recomputed", "experts, offloaded", "others, recomputed")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300)]


TWO = World(0, 2, 0, torch.device("cpu"))  # a plan for two ranks, of which none is started


def named(name: str, shards: Path, output: Path, **sections: Any) -> RunConfig:
    """A run of two steps that starts from weights of which every value matters."""
    model = {"model": sections.get("model", {})}
    base = output / "base.safetensors"
    if not base.exists():
        run = make_run(shards, output, **model)
        save_weights(base, stirred_model(run).state_dict(), run.model, plan_for(run, ALONE).data.origin())
    sections["checkpoint"] = {"resume": "auto", "init": str(base)} | sections.get("checkpoint", {})
    sections["optim"] = {"lr": 1e-3, "weight_decay": 0.1} | sections.get("optim", {})
    sections["train"] = {"steps": 2} | sections.get("train", {})
    return make_run(shards, output, **sections).model_copy(update={"name": name})


def train_each(world: World, runs: list[tuple[RunConfig, dict[str, Any]]]) -> None:
    for run, zero in runs:
        file = Path(run.output) / f"zero{world.rank}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        loop.train(make_plan(run, resolve_ds_config(file, run, world.size), world), world)


def last(run: RunConfig) -> Path:
    folder = Path(run.output) / run.name / "checkpoints"
    return folder / (folder / "latest").read_text()


def state(run: RunConfig) -> dict[str, Tensor]:
    """Every rank's part of masters, optimizer and EMA."""
    files = sorted(last(run).glob("state_rank*.safetensors"))
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunConfig]:
    output = tmp_path_factory.mktemp("runs")
    runs = {}
    for name in selected(request, "name"):
        train, rollout, zero, ep_size, precision = CASES[name]
        sections = {"train": train | {"precision": precision}, "parallel": {"ep_size": ep_size}, "rollout": rollout}
        runs[name] = (named(name, shards, output, **sections), zero)
    run_ranks(train_each, 2, list(runs.values()), timeout=280)
    return {name: run for name, (run, _) in runs.items()}


@pytest.mark.parametrize("name", sweep(CASES, USUAL))
def test_only_what_is_trained_moves_and_has_a_state(name: str, trained: dict[str, RunConfig], tmp_path: Path) -> None:
    """Float32 values of the base, under bf16 too: no rounding of what is not trained."""
    run = trained[name]
    base = load_file(run.checkpoint.init)
    expected = trained_names([key for key in base if key not in buffers(base)], run)
    assert expected < base.keys() - buffers(base)
    for kind in ("live", "ema"):
        weights = load_file(last(run) / f"{kind}.safetensors")
        assert {key for key in base if not torch.equal(weights[key], base[key])} - buffers(base) == expected
    assert {key.split("/")[2] for key in state(run)} == expected
    out = tmp_path / "out.safetensors"
    assert export([str(Path(run.output) / run.name), str(out), "--weights", "live"]) == 0
    assert identical(load_file(out), load_file(last(run) / "live.safetensors"))


def buffers(weights: dict[str, Tensor]) -> set[str]:
    return {key for key in weights if "threshold" in key or "pos_embed" in key}


@pytest.mark.parametrize(
    ("train", "rollout", "zero", "precision"),
    [
        (ROUTERS, CHECKPOINT, {"stage": 3}, "bf16"),
        pytest.param(EXPERTS, TWO_PASS, {"stage": 2}, "fp32", marks=pytest.mark.sweep),
        pytest.param(SALIENCY, CHECKPOINT, {"stage": 3, **OFFLOADED}, "bf16", marks=pytest.mark.sweep),
        pytest.param({}, {}, {"stage": 3, **OFFLOADED}, "fp32", marks=pytest.mark.sweep),
        pytest.param({}, {}, {"stage": 2, "offload_optimizer": CPU}, "bf16", marks=pytest.mark.sweep),
    ],
)
def test_a_run_resumes_bit_for_bit_without_its_base(
    train: dict[str, Any], rollout: dict[str, Any], zero: dict[str, Any], precision: str, shards: Path, tmp_path: Path
) -> None:
    def part(name: str, steps: int) -> tuple[RunConfig, dict[str, Any]]:
        sections = {"train": train | {"precision": precision, "steps": steps}, "rollout": rollout}
        checkpoint = {"checkpoint": {"every": 1, "keep": 1}}  # what it resumes is deleted while it goes on
        return named(name, shards, tmp_path, parallel={"ep_size": 2}, **sections, **checkpoint), zero

    run_ranks(train_each, 2, [part("whole", 4), part("halves", 2)], timeout=280)
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    (tmp_path / "base.safetensors").mkdir()
    run_ranks(train_each, 2, [part("halves", 4)])
    whole, halves = part("whole", 4)[0], part("halves", 4)[0]
    for kind in ("live", "ema"):
        ours, theirs = (load_file(last(run) / f"{kind}.safetensors") for run in (whole, halves))
        assert identical(ours, theirs)
    assert identical(state(whole), state(halves))
    losses = [read_log(tmp_path / name / "log.jsonl")["loss/total"] for name in ("whole", "halves")]
    assert losses[0] == losses[1]


def test_other_patterns_resume_where_they_train_the_same(shards: Path, tmp_path: Path) -> None:
    def run(steps: int, train: dict[str, Any]) -> RunConfig:
        return named("run", shards, tmp_path, model={"depth": 2}, train=train | {"steps": steps})

    run_ranks(train_each, 2, [(run(1, SALIENCY), {"stage": 3})])
    same = {"frozen": ["*"], "trainable": ["moe.saliency_router"]}
    run_ranks(train_each, 1, [(run(2, same), {"stage": 2})])  # and another layout
    assert last(run(2, same)).name == "step00000002"
    for other, verbs in (
        (ROUTERS, "frozen there, trained"),
        ({}, "frozen there, trained"),
        (EXPERTS, "trained there, "),
    ):
        with pytest.raises(CheckpointError, match=f"{verbs}.*train.trainable to .*moe.saliency_router.*or start a new"):
            plan_for(run(3, other), ALONE)
    with pytest.raises(ConfigError, match="train.trainable: 'nothing' matches no parameter"):  # not: another run
        plan_for(run(3, {"trainable": ["nothing"]}), ALONE)


def _freeze(model: Backbone) -> Backbone:
    freeze(model, RunConfig.model_validate({"train": OTHERS}))
    return model


@pytest.mark.parametrize("schedule", ["checkpoint", pytest.param("two_pass", marks=pytest.mark.sweep)])
def test_steps_beside_frozen_parameters_equal_plain_torch(schedule: str, shards: Path, tmp_path: Path) -> None:
    sections = {"optim": {"name": "sgd", "lr": 0.05}, "train": OTHERS, "parallel": {"ep_size": 2}}
    run = make_run(shards, tmp_path, "ec", rollout={"schedule": schedule}, model={"depth": 2}, **sections)
    cases = {str(stage): Case(run, stage, 3) for stage in (2, 3)}
    plain = run.model_copy(update={"parallel": run.parallel.model_copy(update={"ep_size": 1})})
    reference = with_plain_torch(plain, 3, _freeze)
    assert not any("experts" in name for name in reference.gradients)
    for trace in run_ranks(with_engine, 2, cases)[0].values():
        assert_same(trace, reference)
        assert trace.gradients.keys() == reference.gradients.keys()


def test_parameters_that_no_loss_depends_on_are_one_line(shards: Path, tmp_path: Path) -> None:
    run = named("run", shards, tmp_path, stage="pretrain", train=SALIENCY)
    with pytest.raises(
        RuntimeError, match="train.trainable: saliency_router: no loss of stage pretrain depends on"
    ) as e:
        run_ranks(train_each, 1, [(run, {"stage": 3})])
    assert ConfigError.__name__ in str(e.value)


LORA = {"rank": 2, "alpha": 8.0, "targets": ["attn", "cross_attn"]}
ADAPTED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "zero3, recomputed": (CHECKPOINT, {"stage": 3}, {}, "fp32"),
    "zero3, bf16": (TWO_PASS, {"stage": 3}, SALIENCY, "bf16"),
    "zero2": (CHECKPOINT, {"stage": 2}, SALIENCY, "fp32"),
    "zero3, offloaded": (CHECKPOINT, {"stage": 3, **OFFLOADED}, {}, "bf16"),
}


@pytest.mark.parametrize("adapted", sweep(ADAPTED, ["zero3, bf16"]))
def test_adapters_train_resume_and_are_merged(adapted: str, shards: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    rollout, zero, train, precision = ADAPTED[adapted]

    def part(run: str, steps: int, **lora: Any) -> tuple[RunConfig, dict[str, Any]]:
        sections = {"train": train | {"precision": precision, "steps": steps}, "rollout": rollout}
        log = {"log": {"validate_every": 3}}  # of the merged model
        return named(run, shards, tmp_path, parallel={"ep_size": 2}, lora=LORA | lora, **sections, **log), zero

    run_ranks(train_each, 2, [part("whole", 3), part("halves", 2)])
    run_ranks(train_each, 2, [part("halves", 3)])
    whole, halves = part("whole", 3)[0], part("halves", 3)[0]
    live, base = load_file(last(whole) / "live.safetensors"), load_file(whole.checkpoint.init)
    for kind in ("live", "ema"):
        assert identical(*(load_file(last(run) / f"{kind}.safetensors") for run in (whole, halves)))
    assert identical(state(whole), state(halves))
    moved = {key for key in base if not torch.equal(live[key], base[key])} - buffers(base)
    assert {key for key in moved if "saliency_router" not in key} == {
        key for key in base if "attn" in key and key.endswith(".weight") and "norm" not in key
    }
    assert any("saliency_router" in key for key in moved) == bool(train)
    out = tmp_path / "adapters"
    assert export([str(tmp_path / "whole"), str(out), "--adapters", "--weights", "live"]) == 0
    model, _ = load_model(whole.checkpoint.init)
    merged = peft.PeftModel.from_pretrained(model, str(out)).merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], live[key]) for key in moved if "saliency_router" not in key)
    with pytest.raises(
        CheckpointError, match="lora.rank is 2 there, 3 in the run; set lora.rank to the former, or start"
    ):
        plan_for(part("halves", 5, rank=3)[0], TWO)
    for changed in (set(base), {key for key in base if key.endswith("attn.qkv.weight")}, {"blocks.1.moe.experts.w1"}):
        other = {key: value * 1.01 + 0.001 if key in changed else value for key, value in base.items()}
        assert any(not torch.equal(other[key], base[key]) for key in base)
        save_weights(whole.checkpoint.init, other, whole.model)
        with pytest.raises(CheckpointError, match="its adapters were trained on another base than checkpoint.init"):
            initial_model(plan_for(part("halves", 5)[0], TWO))
    save_weights(whole.checkpoint.init, base, whole.model)
    initial_model(plan_for(part("halves", 5)[0], TWO))  # the base itself


def test_a_run_without_adapters_has_none_to_export(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = named("run", shards, tmp_path, train={"steps": 1}, stage="pretrain")
    run_ranks(train_each, 1, [(run, {"stage": 3})])
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--adapters"]) == 2
    assert (
        "its run has no adapters (lora.rank 0); export the whole weights, without --adapters" in capsys.readouterr().err
    )
    (tmp_path / "w.safetensors").touch()
    assert export([str(tmp_path / "w.safetensors"), str(tmp_path / "out"), "--adapters"]) == 2
    assert "no checkpoint, and --adapters reads those of a run" in capsys.readouterr().err
