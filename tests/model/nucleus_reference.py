"""diffusers' Nucleus-Image on random weights of tiny sizes, and ours with the same weights."""

from typing import Any

import torch
from diffusers import NucleusMoEImageTransformer2DModel
from torch import Tensor

from sharpmoe.latent_patches import patchify
from sharpmoe.model.backbone import Backbone, TextCondition
from sharpmoe.model.build import build_model
from sharpmoe.model.published.nucleus import join_parts, place_of, published_parts, read_config, read_published

TINY: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": [4, 6, 6],
    "mlp_ratio": 4.0,
    "dense_moe_strategy": "leave_first_three_blocks_dense",
    "num_experts": 4,
    "moe_intermediate_dim": 24,
    "capacity_factors": [2.0] * 5,
    "use_sigmoid": False,
    "route_scale": 2.5,
}


def reference(seed: int = 0, **changes: Any) -> NucleusMoEImageTransformer2DModel:
    """A random network of diffusers, all of whose parameters matter."""
    torch.manual_seed(seed)
    network = NucleusMoEImageTransformer2DModel(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 and "norm" in name else 0.08 * noise)
    return network.float()


def ours(network: NucleusMoEImageTransformer2DModel, **changes: Any) -> Backbone:
    """Our model with the weights of diffusers', in training mode."""
    config = read_config({key: network.config[key] for key in TINY}, "reference", **changes)
    model = build_model(config)
    published = network.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            place = place_of(name)
            if place is not None:
                value.copy_(read_published(place, published[place.key], config))
    assert {*published_parts(model.state_dict())} == {*published}
    return model.train()


def published_gradients(model: Backbone) -> dict[str, Tensor]:
    """Gradients of our parameters under the published names."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    parts = {
        key: names for key, names in published_parts(found).items() if all(found[name] is not None for name in names)
    }
    return {key: join_parts({name: found[name] for name in names}, model.config) for key, names in parts.items()}  # type: ignore[misc]


def reference_velocity(
    network: NucleusMoEImageTransformer2DModel, x_t: Tensor, t: Tensor, condition: TextCondition
) -> Tensor:
    """The velocity of diffusers' network (B, C, H, W) in our convention: it predicts data - noise on patches."""
    patch, (h, w) = network.config.patch_size, x_t.shape[2:]
    grid = (h // patch, w // patch)
    out = network(
        hidden_states=patchify(x_t, patch),
        img_shapes=[(1, *grid)] * len(x_t),
        encoder_hidden_states=condition.tokens,
        encoder_hidden_states_mask=None if condition.mask.all() else condition.mask,
        timestep=t,
    ).sample
    channels = out.shape[-1] // patch**2
    latent = out.view(len(out), *grid, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return -latent.reshape(len(out), channels, h, w)
