"""SharpMoE: saliency-guided post-training of mixture-of-experts diffusion transformers."""

import importlib
from typing import Any

_ATTRIBUTES = {"attach": "sharpmoe.model.attach", "load_pretrained": "sharpmoe.model.published.load"}


def __getattr__(name: str) -> Any:
    """Import `sharpmoe.attach` or `sharpmoe.load_pretrained` when it is first used.

    Both need torch, which reading a configuration must not import.
    """
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    raise AttributeError(f"module 'sharpmoe' has no attribute {name!r}")
