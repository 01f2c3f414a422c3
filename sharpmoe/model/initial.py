"""Initial values of a model's parameters, each drawn from a generator of its own.

A draw is keyed by (seed, name of the parameter, expert) alone, so a model built whole, block by block, or with a part
of the experts starts from the same numbers.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sharpmoe.config import ModelConfig

_ZERO = ("saliency_router.out.",)  # a freshly attached part does not change the output
_NORMAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class InitialRules:
    """What is special about the initial values of a backbone. The rest: Xavier's, biases zero, norms one."""

    zero: tuple[str, ...] = ()  # parts of the names of parameters that start at zero
    normal: tuple[str, ...] = ()  # beginnings of the names of parameters that start normal, with deviation 0.02
    buffers: Mapping[str, Callable[[ModelConfig], Tensor]] = field(default_factory=dict)  # computed ones, by name


def fill_parameters(model: nn.Module, config: ModelConfig, rules: InitialRules = InitialRules()) -> None:
    """Draw every parameter in place, by one draw of torch's global generator. Meta tensors stay as they are."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial_value(name, parameter.shape, config, seed, rules))


def initial_value(
    name: str,
    shape: Sequence[int],
    config: ModelConfig,
    seed: int,
    rules: InitialRules,
    experts: Iterable[int] | None = None,
) -> Tensor:
    """Return the initial value of the model's parameter or buffer `name`, float32 on the host.

    Xavier linears and experts, zero biases, zero R_sal, norms one, and what the rules of the backbone say.
    `shape` is that of the returned value; a stacked expert weight holds the given `experts` only (all by default).
    """
    last = name.rpartition(".")[2]
    if name in rules.buffers:
        return rules.buffers[name](config)
    if ".experts." in name:
        return _expert_value(name, shape, config, seed, range(shape[0]) if experts is None else experts)
    if last in ("bias", "expert_threshold", "expert_bias") or any(part in name for part in (*_ZERO, *rules.zero)):
        return torch.zeros(*shape)
    if len(shape) == 1:  # weight of a norm
        return torch.ones(*shape)
    generator = keyed_generator(seed, name)
    is_prototype = config.gate == "prototypes" and name.endswith("moe.gate.weight")
    if name.startswith(rules.normal) or is_prototype:
        return _NORMAL_STD * torch.randn(*shape, generator=generator)
    return _xavier(shape, generator)


def _expert_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int, experts: Iterable[int]) -> Tensor:
    if name.endswith(".w3") and config.expert == "gelu":  # both biases
        return torch.zeros(*shape)
    return torch.stack([_xavier(shape[1:], keyed_generator(seed, f"{name}/{expert}")) for expert in experts])


def _xavier(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Glorot's uniform values (out, in)."""
    bound = math.sqrt(6 / (shape[0] + shape[1]))
    return (2 * torch.rand(*shape, generator=generator) - 1) * bound


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator of its own for the draw of one parameter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
