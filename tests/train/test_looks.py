"""Measuring by block: the numbers of a whole model, with one block's weights at a time, and training untouched."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError, TrainingError
from sharpmoe.model.backbone import Backbone, TextCondition
from sharpmoe.parallel.ranks.launch import World, raise_on_all_ranks
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.looks import looks_by_block
from sharpmoe.train.objective import Objective
from sharpmoe.train.session import ema_model, live_model
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.train.setting import ALONE, identical, make_run, plan_for, stirred_model

PARTS = ("attn", "moe.experts", "x_embedder")  # of blocks and of the rest, of all ranks and of some


def called(model: Backbone) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    x, x0_prev = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    text = TextCondition(torch.randn(2, 3, 32, generator=g), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 32))
    text = text._replace(pooled=torch.ones(2, 32))
    with torch.no_grad():
        output = model(x, torch.tensor([0.2, 0.9]), model.prepare(text), x0_prev)
    return [output.v, *(record.gates for record in output.routing)]


def outcomes(world: World, run: RunConfig, stage: int) -> dict[str, Any]:
    """Outputs of averaged and live models made both ways, what a failure leaves, and elements that stay real."""
    plan = plan_for(run, world, stage)
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema = ShardEma(engine, run.optim.ema_decay)
    for shard in ema.shards:
        shard.mul_(1.25)  # an average unlike the weights
    before = engine.full_weights(objective.model, everywhere=True) | {f"ema{i}": x for i, x in enumerate(ema.shards)}
    before = {name: x.clone() for name, x in before.items()}
    found: dict[str, Any] = {}
    for way, precision in itertools.product(("whole", "blocks"), ("bf16", "fp32")):
        log = run.log.model_copy(update={"look_weights": way, "look_precision": precision})
        plan_of = SimpleNamespace(run=run.model_copy(update={"log": log}))
        session: Any = SimpleNamespace(
            plan=plan_of, world=world, objective=objective, engine=engine, ema=ema, adapters=None
        )
        for name, make in (("ema", ema_model), ("live", live_model)):
            model = make(session)
            found[f"{way} {precision} {name}"] = called(model)
        if way == "blocks":
            found["real"] = sum(p.numel() for block in model.blocks for p in block.parameters() if not p.is_meta)
            found["error"] = failing(model, world)
            found["real after an error"] = any(not p.is_meta for b in model.blocks for p in b.parameters())
    after = engine.full_weights(objective.model, everywhere=True) | {f"ema{i}": x for i, x in enumerate(ema.shards)}
    return found | {"untouched": identical(before, after)}


def failing(model: Backbone, world: World) -> str:
    """One rank fails in the middle of a call; every rank raises, none waits."""

    def fail(*_: Any) -> None:
        if world.rank == world.size - 1:
            raise TrainingError("no room")

    hook = model.blocks[1].attn.register_forward_pre_hook(fail)
    try:
        with raise_on_all_ranks(world):
            called(model)
    except TrainingError as error:
        return str(error)
    finally:
        hook.remove()
    return ""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ep_size", "frozen"),
    [
        (3, 2, ()),
        (3, 2, PARTS),
        (2, 2, PARTS),
        pytest.param(2, 1, (), marks=pytest.mark.sweep),
        pytest.param(3, 1, (), marks=pytest.mark.sweep),
        pytest.param(2, 1, PARTS, marks=pytest.mark.sweep),
        pytest.param(3, 1, PARTS, marks=pytest.mark.sweep),
    ],
)
def test_a_model_by_block_is_the_whole_model(stage: int, ep_size: int, frozen: tuple[str, ...], tmp_path: Path) -> None:
    sections = {"parallel": {"ep_size": ep_size}, "train": {"precision": "bf16", "frozen": frozen}}
    run = make_run(make_shards(tmp_path / "shapes"), tmp_path / "run", **sections)
    for found in run_ranks(outcomes, 2, run, stage):
        for name in itertools.product(("bf16", "fp32"), ("ema", "live")):
            assert all(map(torch.equal, found[f"blocks {' '.join(name)}"], found[f"whole {' '.join(name)}"])), name
        assert not torch.equal(found["blocks fp32 ema"][0], found["blocks fp32 live"][0])
        exact, rounded = (found[f"whole {precision} live"][0] for precision in ("fp32", "bf16"))
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
        assert found["real"] == 0
        assert "no room" in found["error"]
        assert not found["real after an error"]
        assert found["untouched"]


def test_large_models_are_measured_by_block_unless_they_have_adapters(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path)
    assert not looks_by_block(run, 2**29)
    assert looks_by_block(run, 2**29 + 1)
    frozen = run.model_copy(update={"train": run.train.model_copy(update={"frozen": ("attn",)})})
    assert looks_by_block(frozen, 2**40)
    adapted = run.model_copy(update={"lora": run.lora.model_copy(update={"rank": 4})})
    assert not looks_by_block(adapted, 2**40)


def test_adapters_by_block_are_refused_where_a_run_is_planned(tmp_path: Path) -> None:
    """And not where a finished run's configuration is read, in which the key did nothing."""
    shards = make_shards(tmp_path / "shards")
    run = make_run(shards, tmp_path, log={"look_weights": "blocks"}, lora={"rank": 4})
    with pytest.raises(ConfigError, match=r"look_weights is blocks, but lora.rank is 4.*set log.look_weights to"):
        plan_for(run, ALONE)
