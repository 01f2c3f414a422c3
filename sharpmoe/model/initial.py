"""Initial values of DiT's parameters, each drawn from a generator of its own.

A draw is keyed by (seed, name of the parameter, expert) alone, so a model built whole, block by block, or with a part
of the experts starts from the same numbers.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.model.embed import sincos_positions

# Blocks start as the identity, and a freshly attached part does not change the output.
_ZERO_INITIALISED = ("modulation.", "cross_attn.proj.", "saliency_router.out.", "final_layer.linear.")
_NORMAL_STD = 0.02  # time and label embeddings, prototypes


def fill_parameters(model: nn.Module, config: ModelConfig) -> None:
    """Draw every parameter in place, by one draw of torch's global generator. Meta tensors stay as they are."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial_value(name, parameter.shape, config, seed))


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, seed: int, experts: Iterable[int] | None = None
) -> Tensor:
    """Return the initial value of the model's parameter or buffer `name`, float32 on the host.

    Xavier linears and experts, zero biases, zero adaLN, cross-attention and final outputs, zero R_sal, norms one.
    `shape` is that of the returned value; a stacked expert weight holds the given `experts` only (all by default).
    """
    last = name.rpartition(".")[2]
    if name == "pos_embed":
        side = config.latent_size // config.patch_size
        return sincos_positions(config.width, (side, side), side)
    if ".experts." in name:
        return _expert_value(name, shape, config, seed, range(shape[0]) if experts is None else experts)
    if last in ("bias", "expert_threshold", "expert_bias") or any(part in name for part in _ZERO_INITIALISED):
        return torch.zeros(*shape)
    if len(shape) == 1:  # weight of a norm
        return torch.ones(*shape)
    generator = _generator(seed, name)
    is_prototype = config.gate == "prototypes" and name.endswith("moe.gate.weight")
    if name.startswith(("t_embedder.", "y_embedder.")) or is_prototype:
        return _NORMAL_STD * torch.randn(*shape, generator=generator)
    return _xavier(shape, generator)


def _expert_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int, experts: Iterable[int]) -> Tensor:
    if name.endswith(".w3") and config.expert == "gelu":  # both biases
        return torch.zeros(*shape)
    return torch.stack([_xavier(shape[1:], _generator(seed, f"{name}/{expert}")) for expert in experts])


def _xavier(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Glorot's uniform values (out, in)."""
    bound = math.sqrt(6 / (shape[0] + shape[1]))
    return (2 * torch.rand(*shape, generator=generator) - 1) * bound


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
