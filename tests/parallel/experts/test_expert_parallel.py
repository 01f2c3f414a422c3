"""Expert parallelism inside ZeRO: any layout of the experts over the ranks trains as one process does."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone
from sharpmoe.parallel.experts.groups import check_ep_size
from tests.distributed import run_ranks
from tests.fixtures_data import make_clips, make_unequal_shards
from tests.parallel.reference import Case, Trace, assert_same, unchanged, with_engine, with_plain_torch
from tests.selection import selected, sweep
from tests.train.setting import make_run

STEPS, FEW = 20, 3
ROUTERS = ("tc", "ec", "diffmoe")
LAYOUTS = {  # name -> world size, ep_size, dispatcher
    "4/1": (4, 1, "native"),
    "4/2 native": (4, 2, "native"),
    "4/4 native": (4, 4, "native"),
    "4/2 megatron": (4, 2, "megatron"),
    "4/4 megatron": (4, 4, "megatron"),
    "2/2 native": (2, 2, "native"),
    "2/2 megatron": (2, 2, "megatron"),
}
SGD = {"name": "sgd", "lr": 0.05}
POOL = {"rollout": {"pool": "trajectory"}}


def tilted(model: Backbone, bias: tuple[float, ...]) -> Backbone:
    """Routers that like each expert as much as `bias` says, whatever the token."""
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.saliency_router.out.bias.copy_(torch.tensor(bias))
    return model


SKEWED = {
    "all tokens to one expert": partial(tilted, bias=(50.0, 0.0, 0.0, 0.0)),
    "an expert without tokens": partial(tilted, bias=(0.0, 0.0, 0.0, -50.0)),
    "a rank without tokens": partial(tilted, bias=(0.0, 0.0, -50.0, -50.0)),
}


@pytest.fixture(scope="module")
def make(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    output = tmp_path_factory.mktemp("runs")

    def make_case(router: str, world: int, ep_size: int = 1, dispatcher: str = "native", **more: dict) -> RunConfig:
        """Two layers, one of them MoE; `world` ranks of 8 / world images each: one pool a rank."""
        sections = {
            "optim": SGD,
            "model": {"depth": 2},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 8 // world},
            "parallel": {"ep_size": ep_size, "dispatcher": dispatcher},
        } | more
        return make_run(shards, output, router, **sections)

    return make_case


def run_layouts(make: Callable[..., RunConfig], world: int, names: list[str]) -> dict[str, Trace]:
    """Train every case in the layouts `names`, all of `world` ranks."""
    cases = {f"{r} {name}": Case(make(r, *LAYOUTS[name]), steps=STEPS) for r in ROUTERS for name in names}
    cases |= {
        f"{skew} {name}": Case(make("tc", *LAYOUTS[name]), steps=FEW, prepare=tilt)
        for skew, tilt in SKEWED.items()
        for name in names
    }
    half = {"train": {"precision": "bf16", "steps": STEPS, "global_batch": 8, "micro_batch": 8 // world}}
    cases |= {f"bf16 {name}": Case(make("diffmoe", *LAYOUTS[name], **half), steps=FEW) for name in names}
    cases |= {f"zero2 {name}": Case(make("diffmoe", *LAYOUTS[name]), 2, FEW) for name in names}
    cases |= {f"pool {name}": Case(make("diffmoe", *LAYOUTS[name], **POOL), steps=FEW) for name in names}
    return run_ranks(with_engine, world, cases, timeout=400)[0]


@pytest.fixture(scope="module")
def traces(make: Callable[..., RunConfig], request: pytest.FixtureRequest) -> dict[str, Trace]:
    traces: dict[str, Trace] = {}
    for world in (2, 4):
        names = [name for name in selected(request, "layout") if LAYOUTS[name][0] == world]
        traces |= run_layouts(make, world, names) if names else {}
    return traces


@pytest.fixture(scope="module")
def reference(make: Callable[..., RunConfig]) -> Callable[..., Trace]:
    """Plain torch on one process, the same global batch in the same micro-batches."""
    cache: dict[tuple, Trace] = {}

    def get(router: str, world: int, steps: int, skew: str | None = None) -> Trace:
        key = (router, world, steps, skew)
        if key not in cache:
            cache[key] = with_plain_torch(make(router, world), steps, SKEWED.get(skew, unchanged))
        return cache[key]

    return get


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["2/2 native"]))
@pytest.mark.parametrize("router", ROUTERS)
def test_twenty_steps_equal_one_process(
    router: str, layout: str, traces: dict[str, Trace], reference: Callable[..., Trace]
) -> None:
    assert_same(traces[f"{router} {layout}"], reference(router, LAYOUTS[layout][0], STEPS))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["2/2 native"]))
@pytest.mark.parametrize("skew", SKEWED)
def test_skewed_routing_equals_one_process(
    skew: str, layout: str, traces: dict[str, Trace], reference: Callable[..., Trace]
) -> None:
    assert_same(traces[f"{skew} {layout}"], reference("tc", LAYOUTS[layout][0], FEW, skew))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["2/2 native"]))
def test_zero2_equals_one_process(layout: str, traces: dict[str, Trace], reference: Callable[..., Trace]) -> None:
    assert_same(traces[f"zero2 {layout}"], reference("diffmoe", LAYOUTS[layout][0], FEW))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["2/2 native"]))
def test_steps_that_are_one_pool_equal_one_process(
    layout: str, traces: dict[str, Trace], make: Callable[..., RunConfig]
) -> None:
    """Experts take what reaches their cutoffs, so that the rows sent to each rank vary."""
    assert_same(traces[f"pool {layout}"], with_plain_torch(make("diffmoe", LAYOUTS[layout][0], **POOL), FEW))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", sweep(LAYOUTS, ["2/2 native"]))
def test_half_precision_is_near(layout: str, traces: dict[str, Trace], reference: Callable[..., Trace]) -> None:
    losses = traces[f"bf16 {layout}"].losses
    expected = reference("diffmoe", LAYOUTS[layout][0], FEW).losses
    assert all(abs(a - b) / b < 0.05 for a, b in zip(losses, expected, strict=True))


@pytest.mark.dist
@pytest.mark.slow
def test_unequal_token_counts_equal_one_process(tmp_path: Path) -> None:
    """Steps on 16, 14 and 30 tokens in turn, over two ranks that share the experts, by both dispatchers and stages."""
    data = {"shards": str(make_unequal_shards(tmp_path / "shards"))}

    def make_case(router: str, ep_size: int, dispatcher: str) -> RunConfig:
        train = {"steps": 6, "global_batch": 8, "micro_batch": 4}
        sections = {"optim": SGD, "model": {"depth": 2, "latent_channels": 3}, "data": data, "train": train}
        return make_run(tmp_path, tmp_path, router, parallel={"ep_size": ep_size, "dispatcher": dispatcher}, **sections)

    layouts = [(router, how, 3) for router in ROUTERS for how in ("native", "megatron")] + [("ec", "native", 2)]
    cases = {layout: Case(make_case(layout[0], 2, layout[1]), layout[2], 6) for layout in layouts}
    traces = run_ranks(with_engine, 2, cases, timeout=400)[0]
    for router in ROUTERS:
        expected = with_plain_torch(make_case(router, 1, "native"), 6)
        for layout in layouts:
            if layout[0] == router:
                assert_same(traces[layout], expected)


@pytest.mark.dist
@pytest.mark.slow
def test_clips_equal_one_process(tmp_path: Path) -> None:
    """Steps on four frames of 16 tokens, over two ranks that share the experts."""
    data = {"shards": str(make_clips(tmp_path / "clips", frames=4))}

    def make_case(router: str, ep_size: int) -> RunConfig:
        train = {"steps": 3, "global_batch": 8, "micro_batch": 4}
        sections = {"optim": SGD, "model": {"depth": 2, "latent_frames": 4}, "data": data, "train": train}
        return make_run(tmp_path, tmp_path, router, parallel={"ep_size": ep_size}, **sections)

    cases = {router: Case(make_case(router, 2), steps=3) for router in ("diffmoe",)}
    traces = run_ranks(with_engine, 2, cases, timeout=400)[0]
    for router, trace in traces.items():
        assert_same(trace, with_plain_torch(make_case(router, 1), 3))


@pytest.mark.dist
@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_a_pool_of_all_ranks_equals_one_process_with_one_pool(router: str, make: Callable[..., RunConfig]) -> None:
    more = {"loss": {"similarity_weight": 0.0}}  # race: a product of means over a rank's own tokens
    parallel = {"ep_size": 2, "pool_scope": "world"}
    trace = run_ranks(with_engine, 2, {"world": Case(make(router, 2, parallel=parallel, **more), steps=FEW)})[0][
        "world"
    ]
    reference = with_plain_torch(make(router, 1, **more), FEW)
    assert max(abs(a - b) for a, b in zip(trace.losses, reference.losses, strict=True)) < 1e-5
    for name, value in reference.weights.items():
        if "threshold" not in name:  # of each rank's own tokens, averaged: only inference reads them
            assert float((trace.weights[name] - value).abs().max()) < 1e-5, name


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", sweep([2, 4], [2]))
def test_nucleus_trains_in_every_layout_as_in_one_process(world: int, make: Callable[..., RunConfig]) -> None:
    small = {"depth": 3, "dense_first": 1, "latent_channels": 4, "num_kv_heads": 1, "capacities": [1.0, 1.3, 2.0]}
    more = {"model": small, "loss": {"routing_weight": 0.5}}
    cases = {
        f"ep {ep_size}, ZeRO-{stage}": Case(make("nucleus", world, ep_size, **more), stage, FEW)
        for ep_size in {2: (1, 2), 4: (4,)}[world]
        for stage in (2, 3)
    }
    traces = run_ranks(with_engine, world, cases, timeout=500)[0]
    expected = with_plain_torch(make("nucleus", world, **more), FEW)
    for trace in traces.values():
        assert_same(trace, expected)


def test_sizes_that_do_not_fit_are_named(make: Callable[..., RunConfig]) -> None:
    check_ep_size(make("ec", 4, 2), 4)
    with pytest.raises(ConfigError, match=r"parallel\.ep_size is 3, allowed: 1 \| 2 \| 4 "):
        check_ep_size(make("ec", 4, 3), 4)
    with pytest.raises(ConfigError, match=r"parallel\.ep_size is 4, allowed: 1 \| 2 "):
        check_ep_size(make("ec", 2, 4), 2)
    with pytest.raises(ConfigError, match=r"a dense model has no experts"):
        check_ep_size(make("dense", 2, 2), 2)
