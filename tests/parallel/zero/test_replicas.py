"""Copies that should be equal on all ranks are compared; one flipped bit is found and named."""

from pathlib import Path

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.errors import TrainingError
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.objective import Objective
from sharpmoe.train.step import train_step
from tests.distributed import run_ranks
from tests.fixtures_data import make_shards
from tests.parallel.reference import items_of
from tests.train.setting import make_run, plan_for, stirred_model


def flip_lowest_bit(value: torch.Tensor) -> None:
    """Change the last bit of a tensor's last element."""
    flat = value.detach().view(-1).view(torch.uint8)
    flat[-4] ^= 1


def answers(world: World, run: RunConfig, stage: int) -> tuple[int, list[str]]:
    """How many tensors were compared, and the error for a bit flipped on rank 1 in each kind of copy."""
    plan = plan_for(run, world, stage)
    plan.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    objective = Objective(stirred_model(run), run)
    engine = Engine(objective, run, plan.ds_config, world)
    ema = ShardEma(engine, 0.9)
    for step, items in enumerate(items_of(plan, world, 2)):
        train_step(engine, objective, ema, items, step, with_routing=False)
    compared = engine.check_replicas(2)
    bias = next(p for name, p in objective.named_parameters() if name.endswith("bias") and p.numel() in range(1, 100))
    counter = next(iter(engine._zero.optimizer.state.values()))["step"]
    errors = []
    for value in (bias, objective.model.moe_layers()[0].expert_threshold, counter):
        if world.rank == 1:
            flip_lowest_bit(value)
        try:
            engine.check_replicas(3)
        except TrainingError as error:
            errors.append(str(error))
        if world.rank == 1:
            flip_lowest_bit(value)
    assert engine.check_replicas(4) == compared
    return compared, errors


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_a_flipped_bit_in_a_copy_is_found_and_named(stage: int, tmp_path: Path) -> None:
    run = make_run(make_shards(tmp_path / "shards"), tmp_path)
    ranks = run_ranks(answers, 3 if stage == 2 else 2, run.model_copy(update={"train": thirds(run)}), stage)
    assert all(rank == ranks[0] for rank in ranks)
    compared, (weight, threshold, steps) = ranks[0]
    parameters = len(list(stirred_model(run).parameters()))
    assert (compared > parameters) if stage == 2 else (5 < compared < parameters)  # ZeRO-3 keeps the small ones whole
    assert weight.startswith("step 3: ranks that should hold equal copies differ in model.")
    assert "bias" in weight
    assert "expert_threshold" in threshold
    assert "the optimizer's step count" in steps
    suspects = "suspect rank 1 (" if stage == 2 else "suspect rank 0 ("  # of two, nobody knows which
    assert suspects in weight


def thirds(run: RunConfig) -> object:
    return run.train.model_copy(update={"global_batch": 6, "micro_batch": 1})
