"""Models with random values, drawn where they compute: a large one drawn on the host takes a minute of one core."""

import math

import torch
from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model
from sharpmoe.model.initial import initial_value

_STD = 0.02


def drawn_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Backbone:
    """Return a model in training mode in which every parameter has an effect: none is zero. Buffers are float32."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(initial_value(name, buffer.shape, config, seed, model.initial))
    draw_parameters(model, dtype, seed)
    return model.train()


@torch.no_grad()
def draw_parameters(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> None:
    """Draw every parameter on its device: Glorot's spread for weights, ones and zeros with noise for the rest."""
    parameters = dict(module.named_parameters())
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in parameters.items():
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        values.normal_(_mean(name, parameter), _std(parameter), generator=generator)
        parameter.data = values.to(dtype)


def _mean(name: str, parameter: Tensor) -> float:
    """One for the weight of a norm."""
    return float(parameter.ndim == 1 and name.endswith("weight"))


def _std(parameter: Tensor) -> float:
    return _STD if parameter.ndim == 1 or 1 in parameter.shape else math.sqrt(2 / sum(parameter.shape[-2:]))
