"""What every backbone of the table promises to those that know the contract only."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sharpmoe.architectures import ARCHITECTURES
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, TextCondition
from sharpmoe.model.build import BACKBONES, build_model
from sharpmoe.moe.routing import CallMode
from tests.toys import POOLED_WIDTH, TEXT_LENGTH, TEXT_WIDTH, toy_config

CASES = [  # every backbone with every condition that it takes
    (backbone, conditioning)
    for backbone in BACKBONES
    for conditioning in ARCHITECTURES[backbone].takes.get("conditioning", ("text", "class"))
]


def test_every_backbone_has_a_record() -> None:
    assert list(BACKBONES) == list(ARCHITECTURES)


def made(backbone: str, conditioning: str) -> Backbone:
    torch.manual_seed(0)
    model = build_model(toy_config("ec", backbone=backbone, conditioning=conditioning))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(conditioning: str) -> tuple[Tensor, Tensor, Condition, Tensor]:
    g = torch.Generator().manual_seed(1)
    x_t, x0_prev = torch.randn(2, 2, 4, 8, 8, generator=g)
    condition: Condition = ClassCondition(torch.tensor([0, 1]))
    if conditioning == "text":
        text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=g)
        mask = torch.ones(2, TEXT_LENGTH, dtype=torch.bool)
        condition = TextCondition(text, mask, torch.randn(2, POOLED_WIDTH, generator=g))
    return x_t, torch.rand(2, generator=g), condition, x0_prev


def calls_of(parts: Sequence[tuple[str, nn.Module]], model: Backbone, conditioning: str) -> list[str]:
    """Names of the parts in the order in which a forward with x0_prev calls them."""
    seen: list[str] = []
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name, part in parts]
    model(*inputs(conditioning))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("backbone", "conditioning"), CASES)
def test_gathered_units_hold_every_parameter_once(backbone: str, conditioning: str) -> None:
    model = made(backbone, conditioning)
    names = [f"{prefix}.{name}" for prefix, part in model.gathered_units() for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(model.get_submodule(name) is part for name, part in model.gathered_units())


@pytest.mark.parametrize(("backbone", "conditioning"), CASES)
def test_the_first_part_embeds_both_latents_and_the_last_makes_the_output(backbone: str, conditioning: str) -> None:
    model = made(backbone, conditioning)
    parts = model.gathered_units()
    used = calls_of(parts, model, conditioning)
    (first, _), (last, _) = parts[0], parts[-1]
    assert sorted(set(used)) == sorted(name for name, _ in parts)
    assert [name for name in set(used) if used.count(name) > 1] == [first]
    assert used.count(first) == 2  # x_t and x0_prev
    assert used[-1] == last
    blocks = [name for name, part in parts if part in list(model.blocks)]
    assert [name for name in used if name in blocks] == blocks
    assert len(blocks) == len(model.blocks)


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "conditioning"), CASES)
def test_a_prepared_condition_gives_the_same_bits(backbone: str, conditioning: str) -> None:
    model = made(backbone, conditioning).eval()
    x_t, t, condition, x0_prev = inputs(conditioning)
    expected = model(x_t, t, condition, x0_prev)
    assert torch.equal(model(x_t, t, model.prepare(condition), x0_prev).v, expected.v)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_layer_replays_its_own_map(backbone: str) -> None:
    model = made(backbone, "text")
    records = model(*inputs("text")).routing
    assert len(records) == len(model.moe_layers())
    other = tuple(record.routing_map.roll(layer + 1, dims=2) for layer, record in enumerate(records))
    replayed = model(*inputs("text"), CallMode(routing_maps=other)).routing
    assert all(torch.equal(record.routing_map, given) for record, given in zip(replayed, other, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "conditioning"), CASES)
def test_a_cast_model_computes_in_its_dtype_with_the_buffers_of_the_exact_one(backbone: str, conditioning: str) -> None:
    model = made(backbone, conditioning).eval()
    x_t, t, condition, x0_prev = inputs(conditioning)
    expected = model(x_t, t, condition, x0_prev).v
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = model.state_dict().keys()
    assert nn.Sequential(model).to(torch.bfloat16)[0] is model  # a part of another module is cast as well
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.state_dict().keys() == state
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    rounded = model(x_t, t, condition, x0_prev)
    assert rounded.v.dtype == torch.float32
    assert 0 < (rounded.v - expected).norm() < 0.1 * expected.norm()
    for dtype in (torch.float64, torch.float32):
        assert {x.dtype for x in model.to(dtype).buffers() if x.is_floating_point()} <= {dtype}


def test_a_buffer_that_two_parts_share_is_cast_once() -> None:
    model = made("dit", "class")
    shared = torch.ones(3)
    for block in model.blocks[:2]:
        block.register_buffer("shared", shared)
    model.to(torch.bfloat16)
    assert all(block.shared.dtype == torch.float32 for block in model.blocks[:2])
