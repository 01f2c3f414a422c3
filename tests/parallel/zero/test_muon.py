"""Muon: each matrix orthogonalised whole, each expert by itself, whatever the ranks hold; everything else by AdamW."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sharpmoe.config import OptimConfig, RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.muon import _orthogonalise
from sharpmoe.parallel.zero.optimizers import optimizer_factory
from sharpmoe.train import loop
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import _learning_rate, train_step
from tests.distributed import run_ranks
from tests.parallel.reference import items_of, watched
from tests.train.setting import identical, make_run, plan_for, stirred_model

MUON = {"name": "muon", "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "momentum": 0.9, "clip_norm": 0.05}
SCALES = {"saliency_router": 5.0, "experts": 0.5, "attn.proj": 2.0}
STEPS = 3

pytestmark = pytest.mark.slow


def _newton_schulz(matrix: Tensor) -> Tensor:
    """The published iteration on one matrix (Jordan et al., Muon), in its own dtype."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_matrices_are_orthogonalised_one_by_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape) * torch.tensor([1.0, 1e-3, 50.0, 1.0]).view(4, 1, 1)
    found = _orthogonalise(matrices)
    for one, expected in zip(found, matrices.double(), strict=True):
        torch.testing.assert_close(one.double(), _newton_schulz(expected), rtol=0, atol=2e-5)
    singular = torch.linalg.svdvals(found[0])
    assert float(singular.max()) < 1.3
    assert float(_orthogonalise(torch.zeros(1, *shape)).abs().max()) == 0


def test_one_step_is_that_of_torch_optim_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one matrix, which is all that torch's takes; it computes in bfloat16, and so does ours in a bf16 run."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(8, 12), torch.randn(8, 12)
    theirs = torch.nn.Parameter(weight.clone())
    theirs.grad = gradient.clone()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw").step()
    update = gradient.lerp(0.1 * gradient, 0.9)
    ours = weight * (1 - 0.1 * 0.1) - 0.1 * 0.2 * 12**0.5 * _orthogonalise(update.bfloat16()[None])[0].float()
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0.1 * 0.2 * 12**0.5 * 2e-2)


def _whole(name: str) -> int | None:
    """How many matrices the rows of a parameter are of, by its name; None: AdamW's. Written out by hand."""
    if name.endswith("attn.qkv.weight"):
        return 3
    if name.endswith("cross_attn.kv.weight"):
        return 2
    if name.endswith(
        ("attn.proj.weight", "cross_attn.q.weight", "mlp.fc1.weight", "mlp.fc2.weight", "experts.w1", "experts.w2")
    ):
        return 1
    return None


def _train_steps(world: World, cases: dict[str, tuple[RunConfig, int]]) -> dict[str, dict[str, Any]]:
    return {name: _steps(world, run, stage) for name, (run, stage) in cases.items()}


def _steps(world: World, run: RunConfig, stage: int) -> dict[str, Any]:
    plan = plan_for(run, world, stage)
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema = ShardEma(engine, run.optim.ema_decay)
    weights = [engine.full_weights(objective.model)]
    gradients, norms = [], []
    for step, items in enumerate(items_of(plan, world, STEPS)):
        taken: dict[str, Tensor] = {}
        norms.append(train_step(watched(engine, objective, taken), objective, ema, items, step, False).grad_norm)
        gradients.append(taken)
        weights.append(engine.full_weights(objective.model))
    return {"weights": weights, "gradients": gradients, "norms": norms}


def _reference(run: RunConfig, trace: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The weights after each step from the same gradients, in float64, matrix by matrix."""
    optim, state = run.optim, {name: w.double() for name, w in trace["weights"][0].items()}
    factor = {name: next((f for k, f in SCALES.items() if f".{k}" in name), 1.0) for name in trace["gradients"][0]}
    plain = [name for name in factor if _whole(name) is None]
    adam = torch.optim.AdamW(
        [{"params": [state[name]], "name": name} for name in plain], betas=optim.betas, weight_decay=optim.weight_decay
    )
    momentum = {name: torch.zeros_like(state[name]) for name in factor if _whole(name)}
    for step, (gradients, norm) in enumerate(zip(trace["gradients"], trace["norms"], strict=True)):
        lr = _learning_rate(optim, step, run.train.steps)
        clipped = {name: each.double() * min(1, optim.clip_norm / norm) for name, each in gradients.items()}
        for group in adam.param_groups:
            group["lr"] = lr * factor[group["name"]]
            state[group["name"]].grad = clipped[group["name"]]
        adam.step()
        for name, average in momentum.items():
            average.lerp_(clipped[name], 1 - optim.momentum)
            update = clipped[name].lerp(average, optim.momentum)
            rows, columns = update.shape[-2] // _whole(name), update.shape[-1]
            whole = torch.stack([_newton_schulz(one) for one in update.reshape(-1, rows, columns)])
            rate = lr * factor[name]
            state[name].mul_(1 - rate * optim.weight_decay)
            state[name].sub_(rate * 0.2 * max(rows, columns) ** 0.5 * whole.view_as(update))
        yield {name: state[name].clone() for name in factor}


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, int]]:
    output = tmp_path_factory.mktemp("runs")

    def case(stage: int, **more: Any) -> tuple[RunConfig, int]:
        return make_run(shards, output, "ec", model={"depth": 2}, optim=MUON | {"lr_scale": SCALES}, **more), stage

    over = {"parallel": {"ep_size": 2}}
    return {"zero2": case(2), "zero3": case(3), "zero2, ep 2": case(2, **over), "zero3, ep 2": case(3, **over)}


@pytest.fixture(scope="module")
def on_two_ranks(runs: dict[str, tuple[RunConfig, int]]) -> dict[str, dict[str, Any]]:
    return run_ranks(_train_steps, 2, runs)[0]


@pytest.fixture(scope="module")
def alone(runs: dict[str, tuple[RunConfig, int]]) -> dict[str, dict[str, Any]]:
    return run_ranks(_train_steps, 1, {"zero2": runs["zero2"]})[0]


def _check(run: RunConfig, trace: dict[str, Any]) -> None:
    assert min(trace["norms"]) > run.optim.clip_norm  # clipping was active
    for step, expected in enumerate(_reference(run, trace)):
        before, after = trace["weights"][step], trace["weights"][step + 1]
        for name, value in expected.items():
            assert float((after[name] - value).abs().max()) < 2e-6, (step, name)
            assert not torch.equal(before[name], after[name]), name


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["zero2", "zero3", "zero2, ep 2", "zero3, ep 2"])
def test_steps_on_two_ranks_are_those_of_each_matrix_in_float64(
    layout: str, runs: dict[str, tuple[RunConfig, int]], on_two_ranks: dict[str, dict[str, Any]]
) -> None:
    _check(runs[layout][0], on_two_ranks[layout])


@pytest.mark.dist
def test_one_rank_is_two_ranks(
    runs: dict[str, tuple[RunConfig, int]], on_two_ranks: dict[str, dict[str, Any]], alone: dict[str, dict[str, Any]]
) -> None:
    _check(runs["zero2"][0], alone["zero2"])
    for layout, trace in on_two_ranks.items():
        for name, value in alone["zero2"]["weights"][1].items():
            assert float((trace["weights"][1][name] - value).abs().max()) < 1e-5, (layout, name)


def _train(world: World, run: RunConfig, stage: int) -> None:
    loop.train(plan_for(run, world, stage), world)


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), pytest.param(2, 2, marks=pytest.mark.sweep)])
def test_a_resumed_run_goes_on_bit_for_bit(ranks: int, stage: int, shards: Path, tmp_path: Path) -> None:
    """Momentum and moments are kept per element; what is frozen takes part in nothing."""

    def named(name: str, steps: int) -> RunConfig:
        train = {"steps": steps, "frozen": ["attn.qkv"]}
        run = make_run(
            shards, tmp_path, "ec", model={"depth": 2}, optim=MUON, train=train, checkpoint={"resume": "auto"}
        )
        return run.model_copy(update={"name": name})

    run_ranks(_train, ranks, named("whole", 3), stage)
    run_ranks(_train, ranks, named("halves", 2), stage)
    run_ranks(_train, ranks, named("halves", 3), stage)
    one, other = (_files(tmp_path / name / "checkpoints" / "step00000003") for name in ("whole", "halves"))
    assert any(key.startswith("momentum_buffer/") and "experts.w1@" in key for key in one)
    assert not any("exp_avg" in key and "experts.w1@" in key for key in one)
    assert identical(one, other)


def _files(folder: Path) -> dict[str, Tensor]:
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return {f"{key}@{name}": value for name, file in files.items() for key, value in file.items()}


def test_another_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="optim.impl: deepspeed has no optim.name: muon; use optim.impl: auto"):
        optimizer_factory(OptimConfig(name="muon", impl="deepspeed"), torch.device("cpu"))
