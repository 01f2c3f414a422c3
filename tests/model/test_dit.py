"""The backbone: sizes, identity of the saliency router, purity, recomputation, replay."""

import pytest
import torch

from sharpmoe.config import ModelConfig
from sharpmoe.latent_patches import patchify, unpatchify
from sharpmoe.model.backbone import ClassCondition, TextCondition
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import rotary_positions, sincos_positions
from sharpmoe.moe.routing import CallMode
from tests.toys import toy_config, toy_model

PUBLISHED = {  # millions, as published: class-conditional, 1000 classes, learn_sigma, positions counted
    ("s", "dense", 8): 32.963,
    ("b", "dense", 8): 130.512,
    ("l", "dense", 8): 458.103,
    ("xl", "dense", 8): 675.130,
    ("s", "tc", 8): 82.608,
    ("b", "ec", 8): 328.891,
    ("l", "tc", 8): 1163.274,
    ("xl", "ec", 8): 1716.273,
    ("s", "diffmoe", 8): 83.513,
    ("b", "diffmoe", 8): 332.472,
    ("l", "diffmoe", 8): 1175.968,
    ("xl", "diffmoe", 8): 1734.997,
    ("s", "diffmoe", 16): 140.265,
    ("b", "diffmoe", 16): 559.222,
    ("l", "diffmoe", 16): 1981.962,
    ("xl", "diffmoe", 16): 2924.986,
}
ROUTERS = ("dense", "tc", "ec", "diffmoe")


@pytest.mark.parametrize(("preset", "router", "experts"), list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(preset: str, router: str, experts: int) -> None:
    config = ModelConfig(
        preset=preset, router=router, num_experts=experts, conditioning="class", learn_sigma=True, saliency_router=False
    )
    with torch.device("meta"):
        total, active = DiT(config).count_parameters()
    assert round(total / 1e6, 3) == PUBLISHED[preset, router, experts]
    assert active <= total


def tiny(router: str, conditioning: str = "text", **fields: object) -> DiT:
    torch.manual_seed(0)
    config = ModelConfig(
        width=32, depth=4, num_heads=2, latent_size=8, router=router, num_experts=4, conditioning=conditioning,
        num_classes=10, text_width=12, pooled_width=6, **fields,
    )  # fmt: skip
    model = DiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # adaLN-Zero would hide every block
            if "saliency_router.out" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        for layer in model.moe_layers():
            if router == "diffmoe":
                layer.expert_threshold.fill_(0.5)
    return model


def inputs(model: DiT, batch: int = 3) -> tuple:
    g = torch.Generator().manual_seed(1)
    x_t, x0_prev = torch.randn(2, batch, 4, 8, 8, generator=g)
    t = torch.rand(batch, generator=g)
    if model.config.conditioning == "class":
        return x_t, t, ClassCondition(torch.randint(0, 10, (batch,), generator=g)), x0_prev
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 2:] = False
    text = torch.randn(batch, 5, 12, generator=g)
    return x_t, t, TextCondition(text, mask, torch.randn(batch, 6, generator=g)), x0_prev


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("router", ROUTERS)
def test_zero_initialised_saliency_router_is_the_base_bitwise(router: str, conditioning: str, training: bool) -> None:
    model = tiny(router, conditioning).train(training)
    x_t, t, condition, x0_prev = inputs(model)
    base, previousd = model(x_t, t, condition), model(x_t, t, condition, x0_prev)
    assert torch.equal(base.v, previousd.v)
    for one, other in zip(base.routing, previousd.routing, strict=True):
        assert torch.equal(one.routing_map, other.routing_map)


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_saliency_router_reads_x0_prev(router: str) -> None:
    model = tiny(router)
    for layer in model.moe_layers():
        torch.nn.init.normal_(layer.saliency_router.out.weight)
    x_t, t, condition, x0_prev = inputs(model)
    assert not torch.equal(model(x_t, t, condition, x0_prev).v, model(x_t, t, condition, -x0_prev).v)


@pytest.mark.parametrize("router", ROUTERS)
def test_forward_has_no_side_effects(router: str) -> None:
    model = tiny(router).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x_t, t, condition, x0_prev = inputs(model)
    first = model(x_t, t, condition, x0_prev).v
    second = model(x_t, t, condition, x0_prev).v
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("router", ROUTERS)
def test_recomputed_blocks_give_the_same_gradients(router: str) -> None:
    model = tiny(router).train()
    x_t, t, condition, x0_prev = inputs(model)
    gradients = []
    for recompute in (False, True):
        model.zero_grad(set_to_none=True)
        model(x_t, t, condition, x0_prev, CallMode(recompute=recompute)).v.square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@pytest.mark.parametrize("router", ["tc", "ec", "diffmoe"])
def test_replayed_routing_is_the_routing(router: str) -> None:
    model = tiny(router).train()
    x_t, t, condition, x0_prev = inputs(model)
    output = model(x_t, t, condition, x0_prev)
    maps = tuple(record.routing_map for record in output.routing)
    assert torch.equal(output.v, model(x_t, t, condition, x0_prev, CallMode(routing_maps=maps)).v)
    other = model(x_t, t, condition, x0_prev, CallMode(routing_maps=tuple(m.roll(1, dims=2) for m in maps)))
    assert not torch.equal(output.v, other.v)


def test_x0_prev_is_detached() -> None:
    model = tiny("diffmoe")
    for layer in model.moe_layers():
        torch.nn.init.normal_(layer.saliency_router.out.weight)
    x_t, t, condition, x0_prev = inputs(model)
    x0_prev.requires_grad_()
    model(x_t, t, condition, x0_prev).v.sum().backward()
    assert x0_prev.grad is None
    assert model.moe_layers()[0].saliency_router.out.weight.grad.abs().sum() > 0


def test_text_that_is_masked_is_not_heard() -> None:
    model = tiny("ec")
    x_t, t, condition, _ = inputs(model)
    changed = condition.tokens.clone()
    changed[0, 2:] = 7.0
    assert torch.equal(model(x_t, t, condition).v, model(x_t, t, condition._replace(tokens=changed)).v)


def test_wrong_condition_is_named() -> None:
    model = tiny("ec", "class")
    x_t, t, _, _ = inputs(model)
    with pytest.raises(TypeError, match="ClassCondition"):
        model(x_t, t, TextCondition(torch.zeros(3, 1, 12), torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 6)))


def test_positions_of_another_grid_lie_centred_on_the_square() -> None:
    square = sincos_positions(32, (4, 4), 4).view(4, 4, 32)
    wide = sincos_positions(32, (2, 8), 4).view(2, 8, 32)
    assert torch.equal(wide[:, 2:6], square[1:3])
    assert torch.equal(sincos_positions(32, (8, 2), 4).view(8, 2, 32), wide.transpose(0, 1).roll(16, dims=-1))
    assert len(wide.view(16, 32).unique(dim=0)) == 16
    turned = rotary_positions(16, (2, 8), "rope_2d", torch.device("cpu")).view(2, 2, 8, 16)
    assert torch.equal(
        turned[:, :, :4], rotary_positions(16, (4, 4), "rope_2d", torch.device("cpu")).view(2, 4, 4, 16)[:, :2]
    )


def test_patches_come_back_on_any_grid() -> None:
    latent = torch.randn(2, 3, 4, 16)
    features = patchify(latent, 2).view(2, 16, 3, 4).transpose(2, 3).flatten(2)  # (channel, place) -> (place, channel)
    assert torch.equal(unpatchify(features, 2, 3, (2, 8)), latent)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("positions", ["sincos", "rope_2d", "rope_1d"])
def test_latents_of_another_aspect_and_as_many_tokens(router: str, positions: str) -> None:
    model = tiny(router, positions=positions).eval()
    x_t, t, condition, x0_prev = inputs(model)
    wide, previous = x_t.reshape(3, 4, 4, 16), x0_prev.reshape(3, 4, 4, 16)
    output = model(wide, t, condition, previous)
    assert output.v.shape == wide.shape
    assert all(record.routing_map.shape[1] == 16 for record in output.routing)
    moved = model(wide.roll(2, dims=3), t, condition, previous.roll(2, dims=3)).v
    assert not torch.allclose(moved, output.v.roll(2, dims=3))  # it knows where a token stands
    loss = model(wide, t, condition, previous, CallMode(recompute=True)).v.square().mean()
    loss.backward()
    assert model.x_embedder.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_one_frame_is_a_still_image(router: str) -> None:
    """Same names and tensors, and the same numbers bit for bit, from models that were made for either."""
    still, moving = tiny(router).eval(), tiny(router, latent_frames=5).eval()
    assert still.state_dict().keys() == moving.state_dict().keys()
    moving.load_state_dict(still.state_dict())
    x_t, t, condition, x0_prev = inputs(still)
    expected, found = still(x_t, t, condition, x0_prev), moving(x_t[:, :, None], t, condition, x0_prev[:, :, None])
    assert torch.equal(found.v[:, :, 0], expected.v)
    for ours, theirs in zip(found.routing, expected.routing, strict=True):
        assert torch.equal(ours.routing_map, theirs.routing_map)


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_of_all_frames_attend_and_compete(router: str) -> None:
    model = tiny(router, latent_frames=3).eval()
    x_t, t, condition, x0_prev = inputs(model)
    clip = torch.stack([x_t, x0_prev, x_t + 1], dim=2)
    output = model(clip, t, condition, clip.flip(2))
    assert output.v.shape == clip.shape
    assert all(record.routing_map.shape[1] == 48 for record in output.routing)
    turned = model(clip.flip(2), t, condition, clip).v
    assert not torch.allclose(turned.flip(2), output.v)  # it knows when a token is
    moved = clip.clone()
    moved[:, :, 2] += 1
    assert not torch.allclose(model(moved, t, condition, clip.flip(2)).v[:, :, 0], output.v[:, :, 0])
    loss = model(clip, t, condition, clip, CallMode(recompute=True)).v.square().mean()
    loss.backward()
    assert model.x_embedder.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("fields", [{"positions": "rope_2d"}, {"positions": "rope_1d"}, {"backbone": "nucleus"}])
def test_a_backbone_without_a_part_for_time_refuses_frames(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="latent_frames is 5, but backbone .* takes still images alone"):
        toy_config(latent_frames=5, **fields)
    model = toy_model(**fields)
    still = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    condition = TextCondition(torch.zeros(1, 3, 6), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 4))
    model(*still, condition)
    with pytest.raises(ValueError, match=r"latent \(4, 1, 8, 8\): .* as \(C, H, W\)"):
        model(still[0][:, :, None], still[1], condition)


@pytest.mark.parametrize("shape", [(4, 5, 8), (4, 8, 13), (4, 0, 8), (3, 8, 8), (4, 0, 8, 8), (4, 1, 1, 8, 8)])
def test_latents_that_are_no_whole_patches_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny("ec")
    _, t, condition, _ = inputs(model)
    with pytest.raises(ValueError, match=r"expected 4 channels and sides that are multiples of the patch size 2"):
        model(torch.zeros(3, *shape), t, condition)
