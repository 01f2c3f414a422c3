"""Add parts to a finished model without changing what it computes: saliency routers, text."""

import logging

import torch
from torch import nn

from sharpmoe.config import ModelConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.dit import DiT
from sharpmoe.moe.router import SaliencyRouter


def attach(model: Backbone, *, seed: int = 0) -> Backbone:
    """Add a zero-initialised saliency router to every MoE layer, in place; returns the model.

    The output stays bit-identical, with and without x0_prev, until the routers are trained (SharpMoE section 3.1).
    Routers that are there already stay as they are. `seed` draws the hidden layers; the global generator is not
    touched. A model without MoE layers is returned as it is, with a warning in the log.
    """
    layers = model.moe_layers()
    if not layers:
        logging.getLogger(__name__).warning("the model has no MoE layer, so no saliency router was attached")
        return model
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if layer.saliency_router is None:
            router = SaliencyRouter(layer.config.width, layer.config.num_experts)
            nn.init.xavier_uniform_(router.hidden.weight, generator=generator)
            nn.init.zeros_(router.hidden.bias)
            nn.init.zeros_(router.out.weight)
            nn.init.zeros_(router.out.bias)
            layer.saliency_router = router.to(next(layer.parameters()))
            layer.train(layer.training)
    _set_config(model, model.config.model_copy(update={"saliency_router": True}))
    return model


def extend_to_text(model: Backbone, text_width: int = 384, pooled_width: int = 384) -> DiT:
    """Build a text-conditional model on a class-conditional trunk; the trunk's output is unchanged at step 0.

    Cross-attention starts at zero, and the pooled text as the embedding of "no class" (the bias of a layer whose weight
    is zero), so that the new model computes, whatever the caption, bit by bit what the old one computes for "no class".
    Raises ConfigError where the model is no DiT, is not class-conditional, has no row for "no class", or sends such
    images to an expert of their own.
    """
    old = model.config
    if not isinstance(model, DiT) or old.conditioning != "class" or not old.class_dropout or old.unconditional_expert:
        raise ConfigError(
            'only a class-conditional DiT with a row for "no class" and without an unconditional expert '
            "can be extended to text"
        )
    widths = {"conditioning": "text", "text_width": text_width, "pooled_width": pooled_width}
    extended = DiT(ModelConfig(**{**old.model_dump(), **widths}))
    extended.load_state_dict(model.state_dict(), strict=False)
    assert extended.text_embedder is not None
    assert model.y_embedder is not None
    last = extended.text_embedder.pooled[2]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(model.y_embedder.table.weight[old.num_classes])
    extended.origin = {name: value for name, value in model.origin.items() if name != "encoder"}  # it had no captions
    return extended.train(model.training)


def _set_config(model: Backbone, config: ModelConfig) -> None:
    model.config = config
    for layer, own in zip(model.moe_layers(), config.moe_blocks, strict=True):
        layer.config = own
