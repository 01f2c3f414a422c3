"""SharpMoE: saliency-guided post-training of mixture-of-experts diffusion transformers."""

import importlib
from typing import Any

_DOORS = {"attach": "sharpmoe.model.attach", "load_pretrained": "sharpmoe.model.weights"}


def __getattr__(name: str) -> Any:
    """Open the two doors for users, `sharpmoe.attach` and `sharpmoe.load_pretrained`, when they are first asked for.

    They need torch, which reading a configuration must not import.
    """
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'sharpmoe' has no attribute {name!r}")
