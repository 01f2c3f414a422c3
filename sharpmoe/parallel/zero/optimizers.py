"""The optimizers of a run, as functions of the flat partitions that DeepSpeed gives them, and their parameter groups.

A parameter group is what shares a learning rate and a process group: experts are apart from other parameters, as
ZeRO-2 requires, and so are the parameters of every pattern of `optim.lr_scale`. Checkpoints name elements by their
parameter, so that a run may resume with other groups.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from sharpmoe.config import OptimConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.patterns import check_patterns, matching_pattern
from sharpmoe.parallel.zero.muon import MuonWithAdamW
from sharpmoe.parallel.zero.placement import is_expert

_Factory = Callable[[Any], torch.optim.Optimizer]


def optimizer_factory(optim: OptimConfig, device: torch.device) -> _Factory:
    """Return the optimizer as a function of its parameters. `optim.impl: auto` compiles nothing.

    Raises ConfigError where this machine cannot run the implementation.
    """
    if optim.name == "muon":
        if optim.impl not in ("auto", "torch"):
            raise ConfigError(f"optim.impl: {optim.impl} has no optim.name: muon; use optim.impl: auto")
        return partial(MuonWithAdamW, optim=optim)
    if optim.name == "sgd":
        return lambda params: torch.optim.SGD(params, lr=optim.lr, weight_decay=optim.weight_decay)
    if optim.impl in ("auto", "torch"):
        return partial(_torch_adamw, optim=optim)
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.impl == "bitsandbytes":
        return partial(_bitsandbytes().AdamW8bit, **settings)
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
        raise ConfigError("optim.impl: apex needs a CUDA device, and no offload_optimizer; use optim.impl: auto")
    return FusedAdam


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim  # noqa: PLC0415 (optional package)
    except ImportError:
        raise ConfigError(
            "optim.impl: bitsandbytes is not installed; pip install --no-deps bitsandbytes==0.50.2, or use optim.impl: "
            "auto"
        ) from None
    return optim


def _deepspeed_adam(device: torch.device, settings: dict[str, Any]) -> _Factory:
    """Return DeepSpeed's own Adam, which builds its kernel at first use (about a minute)."""
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            raise ConfigError(f"optim.impl: deepspeed builds its kernel with {tool}, not found; use optim.impl: auto")
    if device.type == "cuda":
        return partial(FusedAdam, adam_w_mode=True, **settings)
    return partial(DeepSpeedCPUAdam, adamw_mode=True, **settings)


def optimizer_groups(
    module: nn.Module, lr_scale: Mapping[str, float], matrices: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer: what requires a gradient.

    matrices: names of the parameters that Muon updates; their groups have "muon". Each group has the factor of its
    learning rate as "lr_scale". Raises ConfigError where a pattern matches nothing.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    check_patterns("optim.lr_scale", named, lr_scale)
    members: dict[tuple[str | None, bool, bool], list[nn.Parameter]] = {}
    for pattern in (None, *lr_scale):
        members |= {(pattern, moe, muon): [] for moe in (False, True) for muon in (False, True)}
    for name, parameter in named.items():
        members[matching_pattern(name, lr_scale), is_expert(parameter), name in matrices].append(parameter)
    groups = []
    for (pattern, moe, muon), parameters in members.items():
        if parameters:
            placed = {"name": parameters[0].group_name, "moe": True} if moe else {"name": pattern or "shared"}  # type: ignore[attr-defined]
            kind = {"muon": True} if muon else {}
            groups.append({"params": parameters, "lr_scale": lr_scale[pattern] if pattern else 1.0, **placed, **kind})
    return groups


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of every group: `lr` times its factor."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
