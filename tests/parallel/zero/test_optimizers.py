"""Which optimizer and parameter groups a run gets, and what is said where it cannot have them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.optimizers import optimizer_factory
from sharpmoe.train import loop
from sharpmoe.train.setup import initial_model
from sharpmoe.train.step import _learning_rate
from tests.distributed import run_ranks
from tests.parallel.reference import Case, Trace, assert_same, with_engine, with_plain_torch
from tests.train.setting import ALONE, identical, make_run, plan_for

FEW = 3
SCALES = {"saliency_router": 5.0, "experts": 0.5, "saliency_router.out": 3.0}
# A schedule that changes in every step: the factors multiply whatever it gives.
SGD = {"name": "sgd", "lr": 0.05, "warmup_steps": 1, "schedule": "cosine", "final_lr": 0.01}


def test_apex_that_is_not_there_names_the_trap() -> None:
    with pytest.raises(ConfigError, match="PyPI's 'apex' is an unrelated package"):
        optimizer_factory(OptimConfig(impl="apex"), torch.device("cpu"))


def test_auto_on_the_host_is_torch_adamw() -> None:
    optim = OptimConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    optimizer = optimizer_factory(optim, torch.device("cpu"))([torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == 0.1


def test_a_pattern_without_parameters_is_found_before_anything_is_started(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, optim={"lr_scale": {"nothing": 2.0}})
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        initial_model(plan_for(run, ALONE))


@pytest.fixture(scope="module")
def make(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    output = tmp_path_factory.mktemp("runs")

    def make_case(lr_scale: dict[str, float], **more: Any) -> RunConfig:
        sections = {"model": {"depth": 2}, "optim": SGD | {"lr_scale": lr_scale}} | more
        return make_run(shards, output, "ec", **sections)

    return make_case


@pytest.fixture(scope="module")
def on_two_ranks(make: Callable[..., RunConfig]) -> dict[str, Trace]:
    halves = {"parallel": {"ep_size": 2}}
    cases = {
        "zero3": Case(make(SCALES), 3, FEW),
        "zero2": Case(make(SCALES), 2, FEW),
        "zero3, experts over ranks": Case(make(SCALES, **halves), 3, FEW),
        "zero2, experts over ranks": Case(make(SCALES, **halves), 2, FEW),
        "none": Case(make({}), 3, FEW),
        "ones": Case(make(dict.fromkeys(SCALES, 1.0)), 3, FEW),
    }
    return run_ranks(with_engine, 2, cases)[0]


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["zero3", "zero2", "zero3, experts over ranks", "zero2, experts over ranks"])
def test_factors_on_two_ranks_equal_groups_of_plain_torch(
    layout: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    reference = with_plain_torch(make(SCALES), FEW)
    assert_same(on_two_ranks[layout], reference)
    plain = with_plain_torch(make({}), FEW)
    assert max(float((reference.weights[k] - plain.weights[k]).abs().max()) for k in plain.weights) > 1e-3


@pytest.mark.dist
def test_factors_of_one_change_nothing(on_two_ranks: dict[str, Trace]) -> None:
    assert_same(on_two_ranks["ones"], on_two_ranks["none"])


def _adam_steps(world: World, run: RunConfig, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    """Masters after some steps of AdamW on two layers, and the gradient norms."""
    torch.manual_seed(0)
    engine = Engine(_two_layers(), run, plan_for(run, world, stage).ds_config, world)
    norms = []
    for step in range(4):
        engine.backward(engine(_input(step)).square().mean())
        norms.append(engine.step(_learning_rate(run.optim, step, run.train.steps), lambda norm: True).norm)
    return engine.full_weights(engine.module), norms


def _two_layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def _input(step: int) -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(step))


@pytest.mark.dist
@pytest.mark.parametrize(("stage", "ranks"), [pytest.param(2, 1, marks=pytest.mark.sweep), (3, 2)])
def test_adamw_with_factors_equals_torch_in_float64(stage: int, ranks: int, make: Callable[..., RunConfig]) -> None:
    """Weight decay, warm-up, and a clipping norm over all groups."""
    adam = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "warmup_steps": 3, "clip_norm": 0.05}
    run = make({"2": 10.0, "0.bias": 3.0}, optim=adam | {"lr_scale": {"2": 10.0, "0.bias": 3.0}})
    weights, norms = run_ranks(_adam_steps, ranks, run, stage)[0]
    model = _two_layers().double()
    factors = {"0.weight": 1.0, "0.bias": 3.0, "2.weight": 10.0, "2.bias": 10.0}
    groups = [{"params": [parameter], "name": name} for name, parameter in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for step, norm in enumerate(norms):
        optimizer.zero_grad()
        model(_input(step).double()).square().mean().backward()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)), rel=1e-5)
        assert norm > 0.05
        for group in optimizer.param_groups:
            group["lr"] = factors[group["name"]] * _learning_rate(run.optim, step, run.train.steps)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name].double(), value, rtol=1e-5, atol=1e-6)


def _train(world: World, run: RunConfig, stage: int) -> None:
    loop.train(plan_for(run, world, stage), world)


def _save_again(world: World, copy: RunConfig, stage: int) -> None:
    """Load the last checkpoint of a run and save it at once as the checkpoint of another."""
    plan = plan_for(copy, world, stage)
    loop.open_session(plan, world, loop.initial_model(plan)).checkpoints.save(plan.start)


def _state(folder: Path) -> dict[str, Tensor]:
    """Every element of a checkpoint's training state, whole, by kind and parameter."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(folder.glob("state_rank*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["places"])
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key, []).append((places[key.partition("/")[2]], file.get_tensor(key)))
    return {key: torch.cat([part for _, part in sorted(found, key=lambda f: f[0])]) for key, found in parts.items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    "other",
    [(1, 2), pytest.param((2, 3), marks=pytest.mark.sweep)],
    ids=["one rank, zero2", "two ranks, zero3"],
)
def test_a_run_resumes_with_other_factors_and_loses_nothing(
    other: tuple[int, int], shards: Path, tmp_path: Path
) -> None:
    """Moments, average and weights are kept per parameter: other groups are another order of the same elements."""
    ranks, stage = other
    adam = {"optim": {"name": "adamw", "lr": 1e-3}, "model": {"depth": 2}}

    def named(name: str, lr_scale: dict[str, float], steps: int = 2, resume: str = "auto") -> RunConfig:
        sections = adam | {"optim": adam["optim"] | {"lr_scale": lr_scale}}
        run = make_run(shards, tmp_path, "ec", train={"steps": steps}, checkpoint={"resume": resume}, **sections)
        return run.model_copy(update={"name": name})

    run_ranks(_train, 2, named("old", {"saliency_router": 4.0}), 3)
    first = tmp_path / "old" / "checkpoints" / "step00000002"
    for name, scales in (("none", {}), ("more", SCALES)):
        run_ranks(_save_again, ranks, named(name, scales, 3, resume=str(first)), stage)
        assert identical(_state(tmp_path / name / "checkpoints" / "step00000002"), _state(first))
    shutil.copytree(tmp_path / "old", tmp_path / "on")
    run_ranks(_train, ranks, named("on", SCALES, 3), stage)
    assert read_log(tmp_path / "on" / "log.jsonl")["optim/lr/experts"] == {3: pytest.approx(0.5e-3)}
    events = (tmp_path / "on" / "log.jsonl").read_text()
    assert '"optim.lr_scale.experts": [null, 0.5]' in events


@pytest.mark.dist
def test_a_factor_of_zero_freezes(shards: Path, tmp_path: Path) -> None:
    """Routers alone: nothing else moves, not by weight decay either; * is less specific than a name."""
    optim = {"name": "adamw", "weight_decay": 0.1, "lr": 0.01, "lr_scale": {"*": 0.0, "saliency_router": 5.0}}
    weights = []
    for steps in (1, 3):
        run = make_run(shards, tmp_path, "ec", model={"depth": 2}, train={"steps": steps}, optim=optim)
        run_ranks(_train, 1, run.model_copy(update={"name": f"steps{steps}"}), 3)
        folder = tmp_path / f"steps{steps}" / "checkpoints" / f"step{steps:08}"
        weights.append(load_file(folder / "live.safetensors"))
    moved = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert moved
    assert {name for name in moved if "saliency_router" not in name} == set()
