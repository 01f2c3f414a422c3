"""Nucleus-Image against diffusers' implementation on random weights: outputs, choices and gradients."""

from typing import Any

import pytest
import torch
from diffusers import NucleusMoEImageTransformer2DModel
from torch import Tensor

from sharpmoe.config import ModelConfig, RunConfig, SampleConfig
from sharpmoe.model.attach import attach
from sharpmoe.model.backbone import Backbone, ClassCondition, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.published.nucleus import read_config
from sharpmoe.rollout import TrajectoryBatch
from sharpmoe.sampling import Request, SamplingOptions, generate
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import with_schedule
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
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)) / expected.numel() ** 0.5
    (expected * weight).sum().backward()
    (found.v * weight).sum().backward()
    gradients = published_gradients(model)
    assert len(gradients) > 50
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, network.get_parameter(key).grad, rtol=0, atol=1e-5, msg=key)


@pytest.fixture(scope="module")
def model() -> Backbone:
    return ours(reference(capacity_factors=[4.0, 4.0, 4.0, 1.3, 3.1]))


@torch.no_grad()
def test_fresh_saliency_routers_change_no_bit() -> None:
    base = ours(reference())
    for grid in ((4, 4), (3, 5)):
        x_t, t, condition = inputs(grid, (5, 3))
        before = base(x_t, t, condition)
        after = attach(ours(reference()))(x_t, t, condition, torch.randn_like(x_t))
        assert torch.equal(before.v, after.v)
        pairs = zip(before.routing, after.routing, strict=True)
        assert all(torch.equal(a.routing_map, b.routing_map) and torch.equal(a.gates, b.gates) for a, b in pairs)


def test_attached_layers_keep_their_capacities(model: Backbone) -> None:
    attached = attach(ours(reference(capacity_factors=[4.0, 4.0, 4.0, 1.3, 3.1])))
    assert [layer.config.capacity for layer in attached.moe_layers()] == [1.3, 3.1]
    assert attached.config.mean_capacity == pytest.approx(2.2)
    x_t, t, condition = inputs((4, 4), (5, 5))
    taken = [int(record.routing_map.sum()) for record in attached(x_t, t, condition, x_t).routing]
    assert taken == [2 * 4 * 6, 2 * 4 * 13]  # ceil(1.3 * 16 / 4), ceil(3.1 * 16 / 4)


@torch.no_grad()
def test_keys_and_values_of_a_text_are_made_once_per_sampling_run(model: Backbone) -> None:
    layers = [layer for block in model.blocks for layer in (block.text_proj, block.attn.text_k, block.attn.text_v)]
    calls = [0]
    hooks = [layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for layer in layers]
    _, _, condition = inputs((4, 4), (5, 3))
    empty = TextCondition(condition.tokens[:, :2], condition.mask[:, :2])
    sample = SampleConfig(num_steps=6, cfg_scale=3.0)
    generate(model.eval(), model.config, sample, Request(condition, empty, (0, 1)), SamplingOptions(size=(8, 12)))
    for hook in hooks:
        hook.remove()
    model.train()
    assert calls == [len(layers)]


@torch.no_grad()
def test_a_prepared_text_serves_every_grid(model: Backbone) -> None:
    _, _, condition = inputs((4, 4), (5, 3))
    prepared = model.prepare(condition)
    for grid in ((4, 4), (2, 7), (1, 1)):
        x_t, t, _ = inputs(grid, (5, 3), seed=7)
        assert torch.equal(model(x_t, t, prepared).v, model(x_t, t, condition).v)


@torch.no_grad()
def test_padding_of_a_text_changes_nothing(model: Backbone) -> None:
    x_t, t, (tokens, mask, _) = inputs((3, 4), (5, 5))
    longer = TextCondition(torch.cat([tokens, torch.randn(2, 3, 24)], 1), torch.nn.functional.pad(mask, (0, 3)))
    short = model(x_t, t, TextCondition(tokens, mask)).v
    torch.testing.assert_close(model(x_t, t, longer).v, short, rtol=0, atol=1e-5)


def test_other_conditions_and_latents_are_refused(model: Backbone) -> None:
    x_t, t, condition = inputs((4, 4), (5, 5))
    for other in (torch.tensor([1, 2]), ClassCondition(torch.tensor([1, 2]))):
        with pytest.raises(TypeError, match="takes a TextCondition"):
            model(x_t, t, other)
    with pytest.raises(ValueError, match="multiples of the patch size 2"):
        model(x_t[..., :7], t, condition)


def test_a_gate_of_the_dit_can_read_time_and_state() -> None:
    """The choice of a zero-modulated block is then another one at another time."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"width": 24, "depth": 2, "num_heads": 2, "latent_size": 8, "text_width": 24}
    config = ModelConfig(router="ec", num_experts=4, pooled_width=4, gate_input="time_and_state", **fields)
    dit = build_model(config)
    assert dit.moe_layers()[0].gate.weight.shape == (4, 48)
    x_t, _, condition = inputs((4, 4), (5, 5))
    condition = condition._replace(pooled=torch.randn(2, 4))
    logits = [dit(x_t, torch.full((2,), t), condition).routing[0].gate_logits for t in (0.1, 0.9)]
    assert not torch.equal(*logits)
    difference = logits[0] - logits[1]  # the state of the only block before it is the same: time shifts every token
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-5)
    logits[0].square().sum().backward()
    assert dit.t_embedder.mlp[0].weight.grad.any()


def test_the_published_sizes_without_storage() -> None:
    """Sizes of the release (arXiv 2604.12163): 17 billion parameters, about 2 billion active at capacity 2."""
    content = {
        "num_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "joint_attention_dim": 4096,
        "in_channels": 64,
        "out_channels": 16,
        "dense_moe_strategy": "leave_first_three_blocks_dense",
        "num_experts": 64,
        "moe_intermediate_dim": 1344,
        "capacity_factors": [2.0] * 32,
    }
    config = read_config(content, "config.json")
    with torch.device("meta"):
        large = build_model(config)
        network = NucleusMoEImageTransformer2DModel(**content)
    total, active = large.count_parameters()
    kept = sum(buffer.numel() for buffer in large.buffers())
    assert total + kept == sum(parameter.numel() for parameter in network.parameters())
    assert (total, kept) == (16_922_675_200, 32 * 128)
    assert active == 2_075_625_472


def test_every_schedule_has_the_gradient_of_plain() -> None:
    sizes = {"num_experts": 4, "capacities": [2, 1.3, 3.1], "latent_channels": 4, "latent_size": 8, "text_width": 24}
    model_section = {"router": "nucleus", "width": 24, "depth": 3, "num_heads": 2, "num_kv_heads": 1} | sizes
    run = RunConfig.model_validate({"model": model_section | {"dense_first": 1}, "rollout": {"num_steps": 3}})
    torch.manual_seed(0)
    model = build_model(run.model).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x0, x1 = torch.randn(2, 2, 4, 6, 8).double()
    times = torch.rand(3, 2).double().sort(0, descending=True).values
    _, _, (tokens, mask, _) = inputs((3, 4), (5, 3))
    condition = TextCondition(tokens.double(), mask)
    batch = TrajectoryBatch(x0=x0, x1=x1, times=times, condition=condition, saliency=torch.rand(2, 12).double())

    def gradients(**schedule: Any) -> list[Tensor]:
        answer = Objective(model, with_schedule(run, **schedule))(StepRequest((batch,)))
        answer.loss.backward()
        found = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    plain = gradients(schedule="plain")
    assert sum(bool(gradient.any()) for gradient in plain) == len(plain)
    for schedule in ({"schedule": "checkpoint"}, {"schedule": "two_pass"}, {"schedule": "hybrid", "kept_steps": 1}):
        for found, expected in zip(gradients(**schedule), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
