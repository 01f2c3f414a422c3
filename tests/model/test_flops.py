"""The analytic count of FLOPs against the operators that really run, as integers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sharpmoe.config import LoraConfig, ModelConfig
from sharpmoe.families import rows_of_call
from sharpmoe.model.adapters import Adapters, attach_adapters, is_adapter
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, ModelOutput, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.flops import (
    Call,
    backward_flops,
    forward_flops,
    products,
    with_adapters,
)
from sharpmoe.model.patterns import matching_pattern
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, toy_model

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"mlp": "swiglu", "norm": "rmsnorm"},
    "tc": {"top_k": 2, "shared": "gelu", "shared_hidden": 40, "conditioning": "class", "class_dropout": False},
    "ec": {"capacity": 1.5, "expert_hidden": 20, "learn_sigma": True},
    "diffmoe": {"capacity": 1.25, "patch_size": 1, "latent_size": 4, "gate_input": "time_and_state"},
    "promoe_tc": {"conditioning": "class", "num_classes": 5},
    "promoe_ec": {"conditioning": "class", "num_classes": 5},
    "dsmoe": {"width": 32, "num_experts": 8, "num_groups": 4, "top_groups": 2, "qk_norm": True},
    "dit_moe": {"dense_first": 1, "depth": 5},
    "race": {"moe_every": 3, "gate_input": "time_and_state"},
    "nucleus": {"latent_channels": 4, "dense_first": 1, "num_kv_heads": 1, "capacity": 1.3, "mlp_hidden": 20},
}
IMAGES = 3
SIZES = ((8, 8), (4, 8), (12, 10))  # of latents: that of the configuration, a smaller and a larger one
FRAMES = (3, 4, 8)


def condition(config: ModelConfig) -> Condition:
    if config.conditioning == "class":
        return ClassCondition(torch.tensor([0, config.num_classes - int(not config.class_dropout), 2]))
    mask = torch.ones(IMAGES, TEXT_LENGTH, dtype=torch.bool)
    return TextCondition(torch.randn(IMAGES, TEXT_LENGTH, TEXT_WIDTH), mask, torch.randn(IMAGES, POOLED_WIDTH))


def loss_of(output: ModelOutput) -> Tensor:
    """Something that every product of the forward matters to."""
    fields = ("gate_logits", "scores", "gates", "capacity_logits", "similarity", "prediction")
    values = [getattr(record, name) for record in output.routing for name in fields]
    return output.v.sum() + sum(value.nan_to_num().sum() for value in values if value is not None)


def counted(model: Backbone, uses_x0_prev: bool, size: tuple[int, ...] | None = None) -> tuple[ModelOutput, int, int]:
    """FLOPs of a forward and of its backward. Attention is plain products: the counter knows no CPU kernel."""
    x = torch.randn(IMAGES, 4, *(size or (model.config.latent_size, model.config.latent_size)))
    inputs = (x, torch.rand(IMAGES), condition(model.config), torch.randn_like(x) if uses_x0_prev else None)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = model(*inputs)
        with FlopCounterMode(display=False) as backward:
            loss_of(output).backward()
    return output, forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("uses_x0_prev", [True, False])
@pytest.mark.parametrize("router", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_the_count_is_what_runs(size: tuple[int, ...], router: str, uses_x0_prev: bool, training: bool) -> None:
    model = toy_model(router, **FAMILIES[router]).train(training)
    output, forward, backward = counted(model, uses_x0_prev, size)
    rows = sum(int(record.routing_map.sum()) for record in output.routing)
    text_tokens = TEXT_LENGTH if model.config.conditioning == "text" else 0
    call = Call(
        images=IMAGES,
        tokens=math.prod(size) // model.config.patch_size**2,
        rows=rows,
        text_tokens=text_tokens,
        uses_x0_prev=uses_x0_prev,
        training=training,
    )
    done = products(model.config, call)
    assert forward_flops(done).total == forward
    assert backward_flops(done).total == backward


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe", "promoe_ec", "race"])
def test_the_count_of_frames_is_what_runs(router: str) -> None:
    test_the_count_is_what_runs(FRAMES, router, uses_x0_prev=True, training=True)


TARGETS = {"usual": (), "blocks": ("attn", "cross_attn", "blocks.*.mlp", "shared", "modulation"), "all": ("*",)}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("uses_x0_prev", [True, False])
@pytest.mark.parametrize("router", ["dense", "tc", "diffmoe", "promoe_ec", "race", "nucleus"])
def test_the_count_of_adapters_is_what_runs(router: str, uses_x0_prev: bool, targets: str) -> None:
    pytest.importorskip("peft")
    model = toy_model(router, **FAMILIES[router]).train()
    linears = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    wanted = tuple(each for each in TARGETS[targets] if any(matching_pattern(name, [each]) for name in linears))
    lora = LoraConfig(rank=3, targets=wanted)
    attach_adapters(model, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    model.blocks[0].register_forward_pre_hook(with_gradient)
    output, forward, backward = counted(model, uses_x0_prev)
    call = Call(
        images=IMAGES,
        tokens=model.config.num_tokens,
        rows=sum(int(record.routing_map.sum()) for record in output.routing),
        text_tokens=TEXT_LENGTH if model.config.conditioning == "text" else 0,
        uses_x0_prev=uses_x0_prev,
    )
    adapters, plain = Adapters.of(model, lora), products(model.config, call)
    assert adapters is not None
    done = with_adapters(plain, adapters.pairs, lora.rank, others_trained=False)
    assert forward_flops(done).total == forward > forward_flops(plain).total
    assert backward <= backward_flops(done).total < backward_flops(plain).total
    if targets != "all":  # adapters of embedders: an upper bound
        assert backward_flops(done).total == backward


def with_gradient(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Image tokens as those of a block that is not the first."""
    x, *others = inputs
    return (x if x.requires_grad else x.detach().requires_grad_(), *others)


@pytest.mark.parametrize("router", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_by_the_rule_are_those_of_the_map(size: tuple[int, int], router: str) -> None:
    fields = FAMILIES[router] | ({"unconditional_expert": False} if router.startswith("promoe") else {})
    model = toy_model(router, **fields).train()
    output, _, _ = counted(model, uses_x0_prev=True, size=size)
    rows = rows_of_call(model.config, IMAGES, size[0] * size[1] // model.config.patch_size**2)
    assert [int(record.routing_map.sum()) for record in output.routing] == [rows] * model.config.num_moe_layers


def test_an_image_without_class_costs_a_row_per_token() -> None:
    model = toy_model("promoe_ec", conditioning="class", num_classes=5, capacity=2.0).train()
    null = torch.tensor([5, 5, 0])
    output = model(torch.randn(3, 4, 8, 8), torch.rand(3), ClassCondition(null))
    assert [int(record.routing_map.sum()) for record in output.routing] == [2 * 16 + 1 * 32] * 2


def test_parts_are_booked_apart() -> None:
    config = toy_model("diffmoe").config
    plain, recursive, routed = (
        forward_flops(products(config, call))
        for call in (
            Call(images=2, tokens=16),
            Call(images=2, tokens=16, uses_x0_prev=True),
            Call(images=2, tokens=16, rows=10),
        )
    )
    assert plain.dense == recursive.dense == routed.dense
    assert recursive.router > plain.router == routed.router
    assert (plain.routed, routed.routed) == (0, 10 * 2 * 2 * 24 * 96)
    blocks = forward_flops(
        product for product in products(config, Call(images=2, tokens=16, rows=10)) if product.in_block
    )
    assert blocks.routed == routed.routed
    assert blocks.dense < routed.dense


@pytest.mark.parametrize(("preset", "published"), [("s", 6.06), ("b", 23.01), ("l", 80.71), ("xl", 118.64)])
def test_published_sizes_cost_what_was_published(preset: str, published: float) -> None:
    """Gflops of DiT (arXiv 2212.09748, Table 4), which are of multiply-adds; its patch convolution counts as ours."""
    config = ModelConfig(preset=preset, router="dense", conditioning="class", learn_sigma=True)
    assert forward_flops(products(config, Call(tokens=config.num_tokens))).total / 2e9 == pytest.approx(
        published, rel=1e-3
    )


@pytest.mark.parametrize("router", ["ec", "diffmoe"])
@pytest.mark.slow
def test_a_large_model_without_storage(router: str) -> None:
    """L/2 at 256 x 256, text-conditional, with x0_prev: forward and backward on the meta device."""
    config = ModelConfig(preset="l", router=router, conditioning="text")
    images, text_tokens = 4, 32
    with torch.device("meta"):
        model = build_model(config).train()
        x, t = torch.empty(images, 4, 32, 32), torch.empty(images)
        mask = torch.ones(images, text_tokens, dtype=torch.bool)
        text = TextCondition(torch.empty(images, text_tokens, 384), mask, torch.empty(images, 384))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss_of(model(x, t, text, x)).backward()
    rows = rows_of_call(config, images, config.num_tokens) * config.num_moe_layers
    done = products(config, Call(images=images, tokens=256, rows=rows, text_tokens=text_tokens, uses_x0_prev=True))
    assert counter.get_total_flops() == forward_flops(done).total + backward_flops(done).total
