"""SharpMoE: saliency-guided post-training of mixture-of-experts diffusion transformers.

`dir(sharpmoe)` lists the Python interface; docs/tutorials/python-api.md is a tour of it. Every error that a user can
fix is a `SharpMoEError` of one line. Importing this package imports nothing else: torch comes with the first name that
is used, and DeepSpeed only with the commands and `train_run`. Type checkers read `__init__.pyi`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"  # the only place; pyproject.toml reads it

_HOMES = {
    "RolloutLoss": "sharpmoe.api",
    "SamplingStep": "sharpmoe.sampling",
    "SharpMoEError": "sharpmoe.errors",
    "TrainingCallback": "sharpmoe.train.callbacks",
    "TrainingEnd": "sharpmoe.train.callbacks",
    "TrainingLook": "sharpmoe.train.callbacks",
    "TrainingSave": "sharpmoe.train.callbacks",
    "TrainingStep": "sharpmoe.train.callbacks",
    "attach": "sharpmoe.model.attach",
    "batches": "sharpmoe.api",
    "finish_step": "sharpmoe.api",
    "load": "sharpmoe.api",
    "load_pretrained": "sharpmoe.model.published.load",
    "open_shards": "sharpmoe.api",
    "rollout_loss": "sharpmoe.api",
    "sample": "sharpmoe.api",
    "save": "sharpmoe.api",
    "train_run": "sharpmoe.training",
}

__all__ = [
    "RolloutLoss",
    "SamplingStep",
    "SharpMoEError",
    "TrainingCallback",
    "TrainingEnd",
    "TrainingLook",
    "TrainingSave",
    "TrainingStep",
    "__version__",
    "attach",
    "batches",
    "finish_step",
    "load",
    "load_pretrained",
    "open_shards",
    "rollout_loss",
    "sample",
    "save",
    "train_run",
]


def __getattr__(name: str) -> Any:
    """Import a name of the interface when it is first used: most need torch, which reading a run file must not load."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sharpmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the interface."""
    return list(__all__)
