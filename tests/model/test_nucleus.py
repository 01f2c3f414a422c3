"""Nucleus-Image against diffusers' implementation on random weights: outputs, choices and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sharpmoe.model.backbone import TextCondition
from tests.model.nucleus_reference import ours, published_gradients, reference, reference_velocity

VARIED: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, ...]]] = {  # changes, grid, lengths of texts
    "softmax, two heads per key": ({}, (4, 4), (5, 5)),
    "sigmoid": ({"use_sigmoid": True}, (4, 4), (5, 5)),
    "a key per head": ({"num_key_value_heads": None}, (4, 6), (7, 7)),
    "one key for all heads": ({"num_key_value_heads": 1, "use_sigmoid": True}, (5, 3), (4, 4)),
    "capacity per block": ({"capacity_factors": [4.0, 4.0, 4.0, 1.3, 3.1]}, (3, 5), (6, 6)),
    "capacity for all": ({"capacity_factors": 1.7, "num_experts": 3}, (7, 2), (6, 6)),
    "texts of different lengths": ({}, (4, 4), (3, 8)),
    "lengths and a wide grid": ({"use_sigmoid": True, "num_key_value_heads": 4}, (2, 9), (1, 6)),
    "last block dense": (
        {"dense_moe_strategy": "leave_first_three_and_last_block_dense", "num_layers": 6, "capacity_factors": 2.0},
        (4, 4),
        (5, 5),
    ),
    "first block dense": ({"dense_moe_strategy": "leave_first_block_dense"}, (4, 3), (5, 4)),
    "all MoE": ({"dense_moe_strategy": "all_moe", "route_scale": 1.0}, (3, 3), (5, 5)),
    "all dense": ({"dense_moe_strategy": "all_dense", "mlp_ratio": 6.5}, (4, 4), (5, 2)),
    "few tokens": ({"dense_moe_strategy": "all_moe", "capacity_factors": 1.0, "num_experts": 8}, (1, 3), (2, 2)),
    "other axes": ({"axes_dims_rope": [8, 4, 4], "num_layers": 4, "capacity_factors": 2.0}, (4, 5), (5, 5)),
}


def inputs(grid: tuple[int, int], lengths: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor, TextCondition]:
    g = torch.Generator().manual_seed(seed)
    x_t = torch.randn(len(lengths), 4, 2 * grid[0], 2 * grid[1], generator=g)
    text = torch.randn(len(lengths), max(lengths), 24, generator=g)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return x_t, torch.rand(len(lengths), generator=g), TextCondition(text, mask)


def choices_of_reference(network: Any) -> tuple[list[Tensor], list[Any]]:
    """Lists that fill with the tokens (B, E, C) that the experts of each layer take."""
    taken: list[Tensor] = []

    def after(layer: Any, given: tuple[Any, ...], keywords: dict[str, Any], _: Tensor) -> None:
        hidden, normed = given
        time = keywords["timestep"].unsqueeze(1).expand(-1, hidden.shape[1], -1)
        logits = layer.gate(torch.cat([time, normed], -1))
        scores = logits.sigmoid() if layer.use_sigmoid else logits.softmax(-1)
        capacity = max(1, -(-layer.capacity_factor * hidden.shape[1] // layer.num_experts))
        taken.append(scores.transpose(1, 2).topk(int(capacity), dim=-1).indices)

    layers = [block.img_mlp for block in network.transformer_blocks if block.moe_enabled]
    return taken, [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]


@pytest.mark.parametrize("name", VARIED)
def test_outputs_choices_and_gradients_are_those_of_diffusers(name: str) -> None:
    changes, grid, lengths = VARIED[name]
    network = reference(**changes)
    model = ours(network)
    x_t, t, condition = inputs(grid, lengths)
    taken, hooks = choices_of_reference(network)
    expected = reference_velocity(network, x_t, t, condition)
    for hook in hooks:
        hook.remove()
    found = model(x_t, t, condition)
    torch.testing.assert_close(found.v, expected, rtol=0, atol=1e-5)
    assert expected.abs().mean() > 0.1
    assert len(found.routing) == len(taken) == model.config.num_moe_layers
    for record, tokens in zip(found.routing, taken, strict=True):
        chosen = torch.zeros_like(record.routing_map.transpose(1, 2)).scatter_(2, tokens, True)
        assert torch.equal(record.routing_map.transpose(1, 2), chosen)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected.numel()
    (expected * weight).sum().backward()
    (found.v * weight).sum().backward()
    gradients = published_gradients(model)
    assert len(gradients) > 50
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, network.get_parameter(key).grad, rtol=1e-4, atol=1e-5, msg=key)
