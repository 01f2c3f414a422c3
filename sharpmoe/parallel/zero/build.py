"""Fill a model on the meta device part by part, so that no rank holds more than its share.

Under ZeRO-3 each part is partitioned as soon as it is filled: peak memory is the shards and one block.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from sharpmoe.model.backbone import Backbone
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.placement import local_experts


class Values(Protocol):
    """Source of the initial values of a module's tensors."""

    def __call__(self, name: str, shape: torch.Size, experts: range | None) -> Tensor:
        """Return a parameter or buffer by its name in the module; of stacked experts only the given ones."""
        ...


def gathered_units(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ZeRO-3 gathers as one unit each, with names in `module`, whose children are backbones."""
    backbones = [(name, child) for name, child in module.named_children() if isinstance(child, Backbone)]
    return [(f"{outer}.{name}", part) for outer, backbone in backbones for name, part in backbone.gathered_units()]


def materialise(module: nn.Module, values: Values | None, ds_config: dict[str, Any], world: World) -> None:
    """Fill a module on the meta device, in place, in the dtype of training; a real one stays as it is.

    Experts must be placed already. Communicates under ZeRO-3: every part is partitioned at once, and rank 0 of each
    group broadcasts its values.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return
    assert values is not None
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    for prefix, part in gathered_units(module):
        for name, tensor, owner in _tensors(part):
            full = f"{prefix}.{name}"
            value = values(full, tensor.shape, local_experts(full, module))
            assert value.shape == tensor.shape
            _replace(owner, name.rpartition(".")[2], tensor, value, dtype, world.device)
        if ds_config["zero_optimization"]["stage"] == 3:
            deepspeed.zero.Init(module=part, config_dict_or_path=ds_config, dtype=dtype)
    for name, tensor, owner in _tensors(module):
        if tensor.is_meta:  # a buffer of the model itself
            value = values(name, tensor.shape, None)
            _replace(owner, name.rpartition(".")[2], tensor, value, dtype, world.device)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Yield name, tensor and owning module of every parameter and buffer."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        yield name, tensor, module.get_submodule(name.rpartition(".")[0])


def _replace(
    owner: nn.Module, name: str, planned: Tensor, value: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace a tensor on the meta device by a value. Parameters keep their attributes, buffers stay float32."""
    if not isinstance(planned, nn.Parameter):
        setattr(owner, name, value.to(device))
        return
    parameter = nn.Parameter(value.to(device, dtype, copy=True), requires_grad=planned.requires_grad)
    for mark, content in vars(planned).items():
        setattr(parameter, mark, content)
    setattr(owner, name, parameter)
