"""The weight of L_routing over a run: its warm-up, and what a resumed run sees of it."""

from pathlib import Path

import pytest
import torch

from sharpmoe.config import RunConfig
from sharpmoe.log_file import read_log
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.train import loop
from sharpmoe.train.terms import mass_gradient, routing_loss, routing_weight
from tests.distributed import run_ranks
from tests.train.setting import make_run, plan_for


def test_the_weight_rises_linearly_from_zero_and_stays(shards: Path, tmp_path: Path) -> None:
    run = make_run(shards, tmp_path, loss={"routing_weight": 0.5, "routing_warmup_steps": 4})
    assert [routing_weight(run, step) for step in range(6)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert routing_weight(make_run(shards, tmp_path), 0) == 0.5


def test_a_shuffled_map_is_that_of_the_next_image(shards: Path, tmp_path: Path) -> None:
    own = make_run(shards, tmp_path)
    shuffled = make_run(shards, tmp_path, loss={"saliency_map": "shuffled"})
    mass, saliency = torch.rand(4, 16) * 6, torch.rand(4, 16)
    turned = saliency[[3, 0, 1, 2]]
    assert (
        routing_loss(mass, saliency, shuffled) == routing_loss(mass, turned, own) != routing_loss(mass, saliency, own)
    )
    gradients = [mass_gradient(mass, m, run, 1.0) for m, run in ((saliency, shuffled), (turned, own))]
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def _train(world: World, runs: list[RunConfig]) -> None:
    for run in runs:
        loop.train(plan_for(run, world), world)


@pytest.mark.dist
def test_a_resumed_run_goes_on_with_the_weight_of_its_step(shards: Path, tmp_path: Path) -> None:
    def named(name: str, steps: int) -> RunConfig:
        loss = {"routing_weight": 0.5, "routing_warmup_steps": 3}
        sections = {"model": {"depth": 2}, "train": {"steps": steps}, "checkpoint": {"resume": "auto"}}
        return make_run(shards, tmp_path, "ec", loss=loss, **sections).model_copy(update={"name": name})

    run_ranks(_train, 1, [named("whole", 4), named("parts", 2), named("parts", 4)])
    whole, parts = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert whole["optim/routing_weight"] == parts["optim/routing_weight"]
    assert [*whole["optim/routing_weight"].values()] == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
    assert whole["loss/total"] == parts["loss/total"]
    flow, total, routing = (whole[f"loss/{name}"] for name in ("flow", "total", "routing"))
    assert total[1] == pytest.approx(flow[1])  # without a router's own loss, step 1 trains the flow loss alone
    assert total[4] == pytest.approx(flow[4] + 0.5 * routing[4])
