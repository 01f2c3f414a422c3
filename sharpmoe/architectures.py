"""What the configuration must know of each backbone: the values of its fields that it takes. No torch.

A backbone is a record here and a class in `sharpmoe.model.build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A backbone, as the configuration sees it."""

    title: str = "model"  # in banners and tables
    fields: Mapping[str, Any] = field(default_factory=dict)  # fields of `ModelConfig` in which its defaults differ
    takes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # field -> the values that it can have
    ignores: tuple[str, ...] = ()  # fields that change nothing in the network
    frames_with: tuple[str, ...] = ()  # values of `positions` that tell frames apart; none: it takes still images alone


ARCHITECTURES: dict[str, Architecture] = {
    "dit": Architecture(
        title="DiT",
        takes={"positions": ("sincos", "rope_2d", "rope_1d"), "num_kv_heads": (None,), "rope_axes": (None,)},
        frames_with=("sincos",),
    ),
    "nucleus": Architecture(
        title="transformer",
        fields={"conditioning": "text", "positions": "rope_3d", "mlp": "swiglu"},
        takes={
            "conditioning": ("text",),
            "positions": ("rope_3d",),
            "norm": ("layernorm",),
            "qk_norm": (False,),  # it has a norm of its own
            "learn_sigma": (False,),
            "prediction": ("velocity",),
            "time_shift": (0.0,),
        },
        ignores=("latent_size", "pooled_width", "num_classes", "class_dropout"),
    ),
}
