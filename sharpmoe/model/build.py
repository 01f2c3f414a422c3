"""The table of backbones: the one place that knows them by name."""

from sharpmoe.config import ModelConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.dit import DiT
from sharpmoe.model.nucleus import Nucleus

BACKBONES: dict[str, type[Backbone]] = {"dit": DiT, "nucleus": Nucleus}


def build_model(config: ModelConfig) -> Backbone:
    """Build a model with its initial values, from one draw of torch's global generator; on the meta device, without."""
    return BACKBONES[config.backbone](config)
