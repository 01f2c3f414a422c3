"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, made by the package peft: y = W x + alpha / rank B A x.

W is frozen, A (rank, in) is drawn and B (out, rank) is zero at first, so that an adapted model starts as the identity.
peft renames W to `base_layer.weight`, and A and B are `lora_A.default.weight` and `lora_B.default.weight` beside it. A
weights file never holds these names: it holds W + alpha / rank B A under the name of W.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sharpmoe.config import LoraConfig
from sharpmoe.errors import ConfigError
from sharpmoe.model.initial import keyed_generator
from sharpmoe.model.patterns import check_patterns, matching_pattern

_A, _B = "lora_A.default.weight", "lora_B.default.weight"
_BASE = ".base_layer."
_USUAL = ("attn", "cross_attn", "shared")  # attention and shared experts, where the model has them


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a model."""

    scaling: float  # alpha / rank
    pairs: Mapping[str, tuple[str, str]]  # name of W in a weights file -> names of A and B
    shapes: Mapping[str, torch.Size]  # of every A and B

    @classmethod
    def of(cls, model: nn.Module, lora: LoraConfig) -> "Adapters | None":
        """Return those of a model to which `attach_adapters` has given some; None where it has none."""
        shapes = {name: each.shape for name, each in model.named_parameters() if is_adapter(name)}
        layers = sorted(name.removesuffix(f".{_A}") for name in shapes if name.endswith(_A))
        pairs = {f"{layer}.weight": (f"{layer}.{_A}", f"{layer}.{_B}") for layer in layers}
        return cls(scaling=_alpha(lora) / lora.rank, pairs=pairs, shapes=shapes) if pairs else None

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W + alpha / rank B A, in the order of peft's own merge."""
        return weight + (b @ a) * self.scaling

    def merge_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of the plain model of an adapted model's."""
        ours = {plain_name(name): value for name, value in state.items() if not is_adapter(name)}
        for name, (a, b) in self.pairs.items():
            if name in ours:
                ours[name] = self.merged(ours[name], state[a], state[b])
        return ours


def attach_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Give the target layers of a model their adapters, in place; nothing happens where rank is 0.

    What is frozen is for `trainable.freeze` to say. Raises ConfigError where a pattern names no linear layer, and where
    peft is not installed.
    """
    if not lora.rank:
        return
    peft = _peft(lora)
    config = _peft_config(peft, lora, _targets(model, lora))
    with torch.device(next(model.parameters()).device):
        peft.inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    """Whether a parameter is A or B of an adapter."""
    return name.endswith((_A, _B))


def plain_name(name: str) -> str:
    """Return the name in a weights file of a parameter that is no adapter."""
    return name.replace(_BASE, ".")


def adapter_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Return the initial value of A (uniform as in peft, keyed by its name) or B (zero), float32 on the host."""
    if name.endswith(_B):
        return torch.zeros(*shape)
    bound = 1 / math.sqrt(shape[1])
    return (2 * torch.rand(*shape, generator=keyed_generator(seed, name)) - 1) * bound


def adapters_title(lora: LoraConfig) -> str:
    """Return the settings in a few words, empty without adapters."""
    targets = ", ".join(lora.targets) or "attention and shared experts"
    return f"lora: rank {lora.rank}, alpha {_alpha(lora):g} on {targets}" if lora.rank else ""


def save_adapters(folder: Path, lora: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Write A and B of every adapter in peft's format: adapter_model.safetensors and adapter_config.json.

    state: values by the names of an adapted model. Raises OSError, and ConfigError where peft is not installed.
    """
    peft = _peft(lora)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    named = {f"base_model.model.{name.replace('.default', '')}": value.contiguous() for name, value in state.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    _peft_config(peft, lora, names).save_pretrained(str(folder))


def _alpha(lora: LoraConfig) -> float:
    return lora.rank if lora.alpha is None else lora.alpha


def _targets(model: nn.Module, lora: LoraConfig) -> list[str]:
    """Return the names of the linear layers that are adapted."""
    linears = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    wanted: Iterable[str] = lora.targets or [
        pattern for pattern in _USUAL if any(matching_pattern(name, [pattern]) for name in linears)
    ]
    check_patterns("lora.targets", linears, wanted, what="linear layer")
    return [name for name in linears if matching_pattern(name, wanted)]


def _peft_config(peft: Any, lora: LoraConfig, names: Sequence[str]) -> Any:
    return peft.LoraConfig(r=lora.rank, lora_alpha=_alpha(lora), target_modules=list(names), lora_dropout=0.0)


def _peft(lora: LoraConfig) -> Any:
    try:
        import peft  # noqa: PLC0415 (optional package)
    except ImportError:
        raise ConfigError(
            f"lora.rank is {lora.rank}, which needs the packages peft and accelerate; install them with `pip install "
            "--no-deps peft accelerate` (the extra `lora`), or set lora.rank to 0"
        ) from None
    return peft
