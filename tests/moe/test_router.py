"""The router: what it decides in training and inference, and what learns from what."""

import pytest
import torch

from sharpmoe.config import ModelConfig
from sharpmoe.families import FAMILIES
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import CallMode
from sharpmoe.moe.selection import lowest_accepted
from tests.moe.test_counters import layer_of


def test_diffmoe_infers_from_thresholds_and_trains_from_the_pool() -> None:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="diffmoe"))
    h = torch.randn(2, 8, 16)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    _, trained = layer.train()(h)
    assert (trained.routing_map.sum((0, 1)) == 4).all()
    layer.eval().expert_threshold.fill_(1.1)  # no probability is above it: nobody takes anything
    y, inferred = layer(h)
    assert not inferred.routing_map.any()
    assert (y == 0).all()
    layer.expert_threshold.fill_(-0.1)
    assert layer(h)[1].routing_map.all()


def test_capacity_predictor_does_not_teach_the_trunk() -> None:
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="diffmoe"))
    h = torch.randn(2, 8, 16, requires_grad=True)
    layer.capacity_predictor(h).sum().backward()
    assert h.grad is None


def test_a_balancing_bias_moves_the_choice_and_not_the_gates() -> None:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="tc", bias_balancing=True))
    layer.expert_bias[2] = 2.0
    record = layer.route(torch.randn(2, 8, 16))
    assert record.routing_map[..., 2].all()
    assert torch.equal(record.gates, record.scores * record.routing_map)
    assert torch.equal(record.bias, layer.expert_bias)


def test_merged_calls_of_a_race_are_replayed_whatever_their_floors() -> None:
    """Two calls of 16 tokens take 17 pairs each, one of 32 would take 35: a replay fixes no total."""
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=16, num_heads=2, num_experts=4, router="race", capacity=1.1)).train()
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    parts = [torch.randn(1, 16, 16) for _ in range(2)]
    apart = [layer(h) for h in parts]
    maps = torch.cat([record.routing_map for _, record in apart])
    assert maps.sum() == 34
    y, record = layer(torch.cat(parts), mode=CallMode(routing_maps=(maps,)))
    torch.testing.assert_close(y, torch.cat([part for part, _ in apart]))
    assert torch.equal(record.routing_map, maps)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("router", [name for name, family in FAMILIES.items() if family.has_experts])
def test_the_cutoff_is_the_lowest_score_that_was_accepted(router: str, training: bool) -> None:
    """Bit by bit, whether a top-k has found it or it is looked for; with ties, and with images without class."""
    layer = layer_of(router, conditioning="class" if FAMILIES[router].published.get("unconditional_expert") else "text")
    layer.train(training)
    g = torch.Generator().manual_seed(1)
    h = torch.randint(-1, 2, (3, 12, layer.config.width), generator=g).float()
    h[1, 3:9] = h[1, 2]  # tokens that are alike
    unconditional = torch.tensor([False, True, False]) if layer.config.unconditional_expert else None
    features = torch.cat([h, h], -1) if layer.config.gate_input == "time_and_state" else h
    with torch.no_grad():
        record = layer.route(features, None, unconditional)
        again = layer.route(features, None, unconditional, CallMode(routing_maps=(record.routing_map,)))
    assert record.routing_map.any()
    for found in (record, again):
        assert torch.equal(found.cutoff, lowest_accepted(found.scores, found.routing_map, layer.config))
