"""The table of backbones: the one place that knows them by name."""

from collections.abc import Callable

from sharpmoe.config import ModelConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.dit import DiT

BACKBONES: dict[str, Callable[[ModelConfig], Backbone]] = {"dit": DiT}


def build_model(config: ModelConfig, backbone: str = "dit") -> Backbone:
    """Build a model with its initial values, from one draw of torch's global generator; on the meta device, without."""
    return BACKBONES[backbone](config)
