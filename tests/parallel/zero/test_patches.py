"""The optimizer step against torch's own on whole parameters, and what it moves: counted, not timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpmoe.config import RunConfig
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.patches import _euclidean, _joined, patch_optimizer
from tests.distributed import run_ranks
from tests.train.setting import make_run, plan_for

STEPS, CLIP, LR = 4, 0.5, 0.01
WAYS = ("2", "3", "3 offloaded")
SCALES = (100.0, 1e-4)  # of gradients: clipped, and not


class Wide(nn.Module):
    """Two matrices, one of them far from the other in size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).square().mean()


class Allocations(TorchDispatchMode):
    """Adds up the bytes of new tensors of at least `least` elements, and notes which operators read such tensors."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.new, self.readers = least, 0, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [part for arg in args for part in (arg if isinstance(arg, list | tuple) else [arg])]
        large = [part for part in given if isinstance(part, Tensor) and part.numel() >= self.least]
        out = func(*args, **(kwargs or {}))
        made = [part for part in (out if isinstance(out, list | tuple) else [out]) if isinstance(part, Tensor)]
        known = {part.untyped_storage().data_ptr() for part in given if isinstance(part, Tensor)}
        fresh = [part for part in made if part.untyped_storage().data_ptr() not in known]
        self.new += sum(part.nbytes for part in fresh if part.numel() >= self.least)
        if large and (fresh or func._schema.is_mutable):
            self.readers.append(func._opname)
        return out


class Outcome(NamedTuple):
    """What steps of an engine left, and what the last one did to memory."""

    norms: list[float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    new_in_step: int
    new_in_average: int
    readers: list[str]


def one_engine(world: World, run: RunConfig, way: str, scale: float) -> Outcome:
    module = Wide()
    ds_config = plan_for(run, world, int(way[0])).ds_config
    if "offloaded" in way:
        ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = Engine(module, run, ds_config, world)
    ema = ShardEma(engine, 0.9)
    norms = []
    least = 64 * 64 // world.size
    for step in range(STEPS):
        engine.backward(scale * engine(inputs(step)))
        with Allocations(least) as step_bytes:
            norms.append(engine.step(LR, lambda _: True).norm)
        with Allocations(least) as average_bytes:
            ema.update()
    return Outcome(
        norms,
        engine.full_weights(module),
        ema.full_weights(module),
        step_bytes.new,
        average_bytes.new,
        step_bytes.readers,
    )


def inputs(step: int) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step))


def all_engines(world: World, runs: dict[tuple[str, float], RunConfig]) -> dict[tuple[str, float], Outcome]:
    return {key: one_engine(world, run, *key) for key, run in runs.items()}


@pytest.fixture(scope="module")
def outcomes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], Outcome]:
    optim = {"name": "adamw", "lr": LR, "clip_norm": CLIP, "weight_decay": 0.1}
    run = make_run(shards, tmp_path_factory.mktemp("run"), optim=optim)
    return run_ranks(all_engines, 1, {(way, scale): run for way in WAYS for scale in SCALES})[0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.dist
def test_a_step_is_adamw_with_clipping_and_an_average(
    way: str, scale: float, outcomes: dict[tuple[str, float], Outcome]
) -> None:
    got, module = outcomes[way, scale], Wide()
    optimizer = torch.optim.AdamW(module.parameters(), LR, weight_decay=0.1, foreach=True)
    average = {name: value.clone() for name, value in module.state_dict().items()}
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        (scale * module(inputs(step))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
        average = {name: average[name].lerp(value, 0.1) for name, value in module.state_dict().items()}
    assert (min(norms) > CLIP) == (scale == max(SCALES))
    assert got.norms == pytest.approx(norms, rel=1e-5)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(got.weights[name], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.average[name], average[name], rtol=1e-6, atol=1e-6)


@pytest.mark.dist
def test_nothing_the_size_of_a_partition_is_made(outcomes: dict[tuple[str, float], Outcome]) -> None:
    for outcome in outcomes.values():
        assert outcome.new_in_average == 0
    for scale in SCALES:
        assert outcomes["3", scale].new_in_step == 0
        # The norm, AdamW with clipping, and the masters' values for the forward: no pass over memory beside them.
        assert outcomes["3", scale].readers == ["linalg_vector_norm", "_fused_adamw_", "copy_"]


@pytest.mark.parametrize("size", [1, 1023, 1024, 100_000])
def test_the_norm_is_as_exact_as_in_float64(size: int) -> None:
    flat = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert float(_euclidean(flat)) == pytest.approx(float(flat.double().norm()), rel=1e-7)  # one chunk is one float32
    flat[-1] = torch.inf
    assert float(_euclidean(flat)) == float("inf")
    flat[0] = torch.nan
    assert _euclidean(flat).isnan()


def test_only_tensors_behind_each_other_are_joined() -> None:
    whole = torch.arange(10)
    assert torch.equal(_joined([whole[2:5], whole[5:6], whole[6:9]]), whole[2:9])  # type: ignore[arg-type]
    apart: list[Callable[[], list[Tensor]]] = [
        lambda: [whole[2:5], whole[6:9]],
        lambda: [whole[:5], whole[5:].clone()],
        lambda: [whole[:6:2], whole[3:]],
    ]
    for parts in apart:
        assert _joined(parts()) is None


def kept_gradients(world: World, run: RunConfig) -> tuple[list[tuple[int, Any]], list[Tensor]]:
    """Return (elements, stream) of each call of `record_stream` in ZeRO-2, and weights without and with overlap."""
    told, weights = list[tuple[int, Any]](), list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: told.append((tensor.numel(), stream)))
        for overlap in (False, True):
            module = Wide()
            ds_config = plan_for(run, world, 2).ds_config
            ds_config["zero_optimization"] |= {"overlap_comm": overlap, "reduce_bucket_size": 64 * 64 - 1}
            engine = Engine(module, run, ds_config, world)
            if overlap:
                engine._zero.reduction_stream = "second stream"  # the CPU has none, and ignores it
                engine._gate = patch_optimizer(engine._zero, 2, parts_whole=False)
            engine.backward(engine(inputs(world.rank)))
            engine.step(LR, lambda _: True)
            weights.append(module.first.weight.detach().clone())
    return told, weights


@pytest.mark.dist
def test_a_gradient_above_the_bucket_outlives_its_reduction(shards: Path, tmp_path: Path) -> None:
    """On every rank, whoever owns it; smaller ones are copied into the bucket."""
    for told, (alone, overlapped) in run_ranks(kept_gradients, 2, make_run(shards, tmp_path)):
        assert told == [(64 * 64, "second stream")]
        assert torch.equal(alone, overlapped)
