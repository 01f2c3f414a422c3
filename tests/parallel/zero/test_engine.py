"""ZeRO-3 and ZeRO-2 on two ranks against plain torch on one process: the same global batch, the same numbers."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero import engine as module
from sharpmoe.parallel.zero.engine import Engine
from tests.distributed import run_ranks
from tests.parallel.reference import Case, Trace, assert_same, with_engine, with_plain_torch
from tests.train.setting import make_run, plan_for

STEPS, FEW = 10, 3
ROUTERS = ("dense", "tc", "ec", "diffmoe")
SCHEDULES_OF = dict.fromkeys(ROUTERS, ("plain", "two_pass")) | {"diffmoe": ("plain", "checkpoint", "two_pass")}
POOLS = ("diffmoe", "race")  # families whose tokens compete with those of other images
STEERING = {"routing_gradient": "saliency_routers"}
SGD = {"name": "sgd", "lr": 0.05}


@pytest.fixture(scope="module")
def make(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    output = tmp_path_factory.mktemp("runs")

    def make_case(router: str, schedule: str = "plain", pool: str = "step", **sections: dict[str, object]) -> RunConfig:
        rollout = {"num_steps": 3, "schedule": schedule, "pool": pool}
        model = {} if router == "diffmoe" else {"depth": 2}
        return make_run(shards, output, router, optim=SGD, rollout=rollout, model=model, **sections)

    return make_case


@pytest.fixture(scope="module")
def on_two_ranks(make: Callable[..., RunConfig]) -> dict[str, Trace]:
    cases = {
        f"{router} {schedule}": Case(make(router, schedule), steps=STEPS if schedule == "plain" else FEW)
        for router in ROUTERS
        for schedule in SCHEDULES_OF[router]
    }
    cases |= {f"zero2 {way}": Case(make("diffmoe", way), 2, FEW) for way in ("plain", "two_pass")}
    cases |= {f"pool {router}": Case(make(router, "two_pass", "trajectory"), steps=FEW) for router in POOLS}
    return run_ranks(with_engine, 2, cases)[0]


@pytest.mark.dist
@pytest.mark.parametrize("router", ROUTERS)
def test_zero3_on_two_ranks_equals_plain_torch(
    router: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    assert_same(on_two_ranks[f"{router} plain"], with_plain_torch(make(router)))
    few = with_plain_torch(make(router), FEW)
    for schedule in SCHEDULES_OF[router][1:]:  # they have equal gradients, see tests/test_rollout.py
        assert_same(on_two_ranks[f"{router} {schedule}"], few)


@pytest.mark.dist
@pytest.mark.parametrize("router", POOLS)
def test_steps_that_are_one_pool_equal_plain_torch(
    router: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    pooled = with_plain_torch(make(router, pool="trajectory"), FEW)
    assert_same(on_two_ranks[f"pool {router}"], pooled)
    by_step = with_plain_torch(make(router), FEW)
    assert pooled.losses[0] == pytest.approx(by_step.losses[0]), "there are no cutoffs before the first step"
    assert abs(pooled.losses[1] - by_step.losses[1]) > 1e-4


@pytest.mark.dist
def test_saliency_routers_that_run_twice_in_a_block_equal_plain_torch(make: Callable[..., RunConfig]) -> None:
    cases = {"two_pass": Case(make("ec", "two_pass", loss=STEERING), steps=FEW)}
    trace = run_ranks(with_engine, 2, cases)[0]["two_pass"]
    assert_same(trace, with_plain_torch(make("ec", loss=STEERING), FEW))


@pytest.mark.dist
@pytest.mark.parametrize("schedule", ["plain", "two_pass"])
def test_zero2_on_two_ranks_equals_plain_torch(
    schedule: str, on_two_ranks: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    assert_same(on_two_ranks[f"zero2 {schedule}"], with_plain_torch(make("diffmoe"), FEW))


@pytest.mark.dist
def test_one_rank_and_half_precision(make: Callable[..., RunConfig]) -> None:
    half = {"train": {"precision": "bf16"}}
    cases = {
        "alone": Case(make("diffmoe"), steps=FEW),
        "zero3 bf16": Case(make("diffmoe", **half), steps=FEW),
        "zero2 bf16": Case(make("diffmoe", "two_pass", **half), 2, FEW),
    }
    traces = run_ranks(with_engine, 1, cases)[0]
    reference = with_plain_torch(make("diffmoe"), FEW)
    assert_same(traces["alone"], reference)
    for name in ("zero3 bf16", "zero2 bf16"):
        losses = traces[name].losses
        assert max(abs(a - b) for a, b in zip(losses, reference.losses, strict=True)) < 0.05
        assert all(value.dtype == torch.float32 for value in traces[name].weights.values())


def refused(world: World, run: RunConfig, stage: int, factor: float) -> tuple[float, float, bool, bool]:
    """Norms of two steps, whether the first was applied and moved the weights; it is refused where it is finite."""
    engine = Engine(torch.nn.Linear(4, 4), run, plan_for(run, world, stage).ds_config, world)
    before = [part.detach().clone() for part in engine.state.masters()]
    engine.backward(engine(torch.ones(2, 4)).sum() * (factor if world.rank == 0 else 1.0))
    first = engine.step(0.1, lambda norm: False)
    moved = any(not torch.equal(a, b) for a, b in zip(before, engine.state.masters(), strict=True))
    engine.backward(engine(torch.ones(2, 4)).sum())
    return first.norm, engine.step(0.1, lambda norm: True).norm, first.applied, moved


@pytest.mark.dist
@pytest.mark.parametrize("factor", [torch.inf, 3.0])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_refused_step_moves_nothing_and_leaves_no_gradient(
    stage: int, factor: float, make: Callable[..., RunConfig]
) -> None:
    norm = 20**0.5 * 2  # of a sum over 2 x 4 outputs: 16 weights and 4 biases, each with gradient 2
    expected = norm * (factor + 1) / 2
    for first, second, applied, moved in run_ranks(refused, 2, make("dense"), stage, factor):
        assert first == pytest.approx(expected)
        assert second == pytest.approx(norm)
        assert (applied, moved) == (False, False)


class Sizes(TorchDispatchMode):
    """Notes the elements of the largest tensor that is allocated."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(word in func.overloadpacket.__name__ for word in ("empty", "clone", "zeros")):
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_masters_and_average_change_places_without_a_second_set(
    error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 8)
    masters = [torch.randn(30), torch.tensor([float("nan"), -0.0, 1e-45])]
    average = [torch.randn(30), torch.tensor([float("inf"), 0.0, -1.0])]
    before = [[part.clone().view(torch.int32) for part in parts] for parts in (masters, average)]
    engine: Any = SimpleNamespace(state=SimpleNamespace(masters=lambda: masters))
    inside = []

    def look() -> None:
        with Engine.masters_replaced(engine, average):
            inside.extend(part.clone() for part in masters)
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        look()
    assert all(torch.equal(part.view(torch.int32), own) for part, own in zip(inside, before[1], strict=True))
    for parts, own in zip((masters, average), before, strict=True):
        assert all(torch.equal(part.view(torch.int32), bits) for part, bits in zip(parts, own, strict=True))


def test_what_is_exchanged_goes_through_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 8)
    with Sizes() as sizes:
        module._exchange([torch.arange(30.0)], [torch.arange(30.0, 60.0)])
    assert sizes.largest == 8
