"""The optimizers of a run, as functions of the flat partitions that DeepSpeed gives them."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import Tensor

from sharpmoe.config import OptimConfig
from sharpmoe.errors import ConfigError

_Factory = Callable[[Any], torch.optim.Optimizer]


def optimizer_factory(optim: OptimConfig, device: torch.device) -> _Factory:
    """Return the optimizer as a function of its parameters. `optim.impl: auto` compiles nothing.

    Raises ConfigError where this machine cannot run the implementation.
    """
    if optim.name == "sgd":
        return lambda params: torch.optim.SGD(params, lr=optim.lr, weight_decay=optim.weight_decay)
    if optim.impl in ("auto", "torch"):
        return partial(_torch_adamw, optim=optim)
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.impl == "apex":
        return partial(_apex_fused_adam(device), adam_w_mode=True, **settings)
    return _deepspeed_adam(device, settings)


def _torch_adamw(params: Any, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's fused AdamW: one pass over each flat partition, on CUDA and CPU, as fast as those that compile."""
    return torch.optim.AdamW(params, optim.lr, optim.betas, optim.eps, weight_decay=optim.weight_decay, fused=True)


def _apex_fused_adam(device: torch.device) -> Any:
    try:
        import amp_C  # noqa: F401, PLC0415 (optional package)
        from apex.optimizers import FusedAdam  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "optim.impl: apex is not NVIDIA's here (PyPI's 'apex' is an unrelated package); build it from "
            "github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use optim.impl: auto"
        ) from None
    if device.type != "cuda":
        raise ConfigError("optim.impl: apex needs a CUDA device; use optim.impl: auto")
    return FusedAdam


def _deepspeed_adam(device: torch.device, settings: dict[str, Any]) -> _Factory:
    """Return DeepSpeed's own Adam, which builds its kernel at first use (about a minute)."""
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError(f"optim.impl: deepspeed builds its kernel with {tool}, not found; use optim.impl: auto")
    if device.type == "cuda":
        return partial(FusedAdam, adam_w_mode=True, **settings)
    return partial(DeepSpeedCPUAdam, adamw_mode=True, **settings)


def make_states(optimizer: torch.optim.Optimizer, masters: Sequence[Tensor]) -> None:
    """Have an optimizer create the states that it creates at its first step, by a step with learning rate zero."""
    groups = optimizer.param_groups
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.param_groups = [{**groups[0], "params": list(masters), "lr": 0.0}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        for master in masters:
            master.grad = None
