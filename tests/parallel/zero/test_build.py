"""A model built part by part on the ranks is the one that would have been built whole."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharpmoe.config import RunConfig
from sharpmoe.model.build import build_model
from sharpmoe.model.weights import StartingWeights, save_weights
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.build import gathered_units
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.train.objective import Objective
from tests.distributed import run_ranks
from tests.train.setting import identical, make_run, plan_for, stirred_model


def built(world: World, run: RunConfig, stage: int, base: str | None) -> tuple[dict[str, Tensor], int, int]:
    """Weights of a model filled on the ranks; the most elements that were real at once, and what a part may have."""
    with torch.device("meta"):
        objective = Objective(build_model(run.model), run)
    values = Objective.values(StartingWeights(run.model, run.seed, base))
    peaks: list[int] = []

    def watched(name: str, shape: torch.Size, experts: range | None) -> Tensor:
        peaks.append(real_elements(objective))
        return values(name, shape, experts)

    engine = Engine(objective, run, plan_for(run, world, stage).ds_config, world, watched)
    largest = max(
        part_elements(part, run.parallel.ep_size) for _, part in gathered_units(Objective(build_model(run.model), run))
    )
    return engine.full_weights(objective.model), max(peaks), largest


def real_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.is_meta)


def part_elements(part: nn.Module, ep_size: int) -> int:
    shares = [p.numel() // (ep_size if ".experts." in name else 1) for name, p in part.named_parameters()]
    return sum(shares)


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Any:
    return partial(make_run, shards, tmp_path, "diffmoe")


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "ep_size", "stage"), [(2, 2, 3), (2, 1, 3), (2, 2, 2), (1, 1, 3)])
def test_parts_on_ranks_equal_the_whole_to_the_last_bit(ranks: int, ep_size: int, stage: int, run: Any) -> None:
    config = run(parallel={"ep_size": ep_size}, seed=3)
    weights, peak, largest = run_ranks(built, ranks, config, stage, None)[0]
    values = StartingWeights(config.model, config.seed)
    assert identical(
        weights, {name: values(name, value.shape) for name, value in build_model(config.model).state_dict().items()}
    )
    if stage == 3:
        assert 0 < peak <= largest  # one block's share, never the model


@pytest.mark.dist
def test_a_weights_file_is_read_part_by_part(run: Any, tmp_path: Path) -> None:
    config = run(parallel={"ep_size": 2})
    state = stirred_model(config).state_dict()
    save_weights(tmp_path / "base.safetensors", state, config.model)
    weights, _, _ = run_ranks(built, 2, config, 3, str(tmp_path / "base.safetensors"))[0]
    assert identical(weights, dict(state))
