"""What moves once per optimizer step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpmoe.config import ModelConfig
from sharpmoe.families import tokens_per_expert
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import Routing
from sharpmoe.moe.thresholds import threshold_candidates, update_biases, update_thresholds

SHAPES = st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(1, 6))


def records(router: str, layers: int = 2) -> tuple[ModelConfig, list[Routing]]:
    torch.manual_seed(0)
    config = ModelConfig(width=16, num_heads=2, num_experts=4, router=router)
    return config, [MoELayer(config).train().route(torch.randn(2, 8, 16)) for _ in range(layers)]


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.floats(0.5, 1.0))
def test_predicted_candidates_are_the_lowest_probability_of_the_best(
    shape: tuple[int, int, int], seed: int, capacity: float
) -> None:
    layers = torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed)).unbind()
    config = ModelConfig(router="diffmoe", num_experts=shape[2], capacity=capacity)
    _, [record] = records("diffmoe", layers=1)
    count = tokens_per_expert(shape[0] * shape[1], shape[2], capacity)
    expected = [logits.flatten(0, 1).topk(count, dim=0).values[-1].sigmoid() for logits in layers]
    given_records = [record._replace(capacity_logits=logits) for logits in layers]
    assert torch.equal(threshold_candidates(given_records, config), torch.stack(expected))


@pytest.mark.parametrize("router", ["diffmoe", "race"])
def test_candidates_are_levels_of_a_share_not_of_a_count(router: str) -> None:
    """A step on three times as many tokens of the same kind asks for the same thresholds."""
    config, made = records(router)
    larger = []
    for record in made:
        repeated = {"scores": record.scores.repeat(1, 3, 1), "routing_map": record.routing_map.repeat(1, 3, 1)}
        if record.capacity_logits is not None:
            repeated["capacity_logits"] = record.capacity_logits.repeat(1, 3, 1)
        larger.append(record._replace(**repeated))
    assert torch.equal(threshold_candidates(made, config), threshold_candidates(larger, config))


def test_accepted_candidates_are_the_cutoffs() -> None:
    config, made = records("race")
    expected = torch.stack([record.scores[record.routing_map].min().expand(4) for record in made])
    assert torch.equal(threshold_candidates(made, config), expected)


def test_thresholds_are_a_moving_average() -> None:
    thresholds = [torch.tensor([0.0, 1.0])]
    update_thresholds(thresholds, torch.tensor([[1.0, 0.0]]), 0.75)
    torch.testing.assert_close(thresholds[0], torch.tensor([0.25, 0.75]))


def test_biases_pull_loads_together() -> None:
    biases = [torch.zeros(3), torch.ones(3)]
    update_biases(biases, torch.tensor([[0.5, 0.3, 0.1], [0.2, 0.2, 0.2]]), 0.01)
    torch.testing.assert_close(biases[0], torch.tensor([-0.01, 0.0, 0.01]))
    assert torch.equal(biases[1], torch.ones(3))
