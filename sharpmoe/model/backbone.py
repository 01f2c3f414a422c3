"""The contract between a network and everything that trains, samples, evaluates or plans it.

Rollout, losses, sampling, evaluation, the engine, planning and checkpoints know a `Backbone` and no class that is one:
`sharpmoe.model.build.build_model` makes it. Parallelism stays outside: experts are moved by each layer's dispatcher.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from sharpmoe.config import ModelConfig
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import CallMode, Routing


class ClassCondition(NamedTuple):
    """Class-conditional input."""

    labels: Tensor  # (B,) int64; num_classes stands for "no class"


class TextCondition(NamedTuple):
    """Text-conditional input."""

    tokens: Tensor  # (B, L, D_text) token states
    mask: Tensor  # (B, L) bool, True where a token is real
    pooled: Tensor  # (B, D_pooled)


Condition = ClassCondition | TextCondition
# What a backbone computes from a condition alone: a NamedTuple of its own, opaque to all others.
Prepared = tuple[Any, ...]


class ModelOutput(NamedTuple):
    """What one denoising call returns."""

    v: Tensor  # (B, C, H, W) predicted velocity, float32 or better
    routing: tuple[Routing, ...]  # one per MoE layer, in depth order; empty for a dense model


class Backbone(nn.Module, ABC):
    """A denoising network with MoE layers. Its forward has no side effects."""

    config: ModelConfig
    blocks: nn.ModuleList  # in the order of use: what is compiled, recomputed and priced as one

    @abstractmethod
    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition | Prepared | Tensor,
        x0_prev: Tensor | None = None,
        mode: CallMode = CallMode(),
    ) -> ModelOutput:
        """Predict the velocity at x_t (B, C, H, W), t (B,) in [0, 1], 0 = data.

        x_t need not be square, but has as many tokens as a square one of the configured size; ValueError otherwise.
        condition: what the model is conditioned on, or what `prepare` made of it; a bare tensor (B,) is read as class
        labels; TypeError where the model is conditioned on something else. x0_prev (B, C, H, W): clean latent
        predicted by the previous step, which the saliency routers read, detached here; None gives the base routing.
        """

    @abstractmethod
    def prepare(self, condition: Condition) -> Prepared:
        """Compute once what forward would compute of a condition at every step, bit for bit.

        Reads parameters outside of their blocks: the model must be whole.
        """

    @abstractmethod
    def whole_parts(self) -> list[tuple[str, nn.Module]]:
        """Return the parts that ZeRO-3 gathers whole, by name in this module, in the order in which forward uses them.

        They hold every parameter once. The first embeds x_t, and x0_prev too; the last makes the output.
        """

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return self.config.num_tokens

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in depth order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def count_parameters(self) -> tuple[int, int]:
        """Count parameters: (total, active per token), as published figures do; thresholds and biases do not count.

        An expert counts as active in proportion to its mean share of tokens.
        """
        total = sum(p.numel() for p in self.parameters())
        idle = 0.0
        for moe in self.moe_layers():
            expert_parameters = sum(p.numel() for p in moe.experts.parameters())
            per_token = moe.config.top_k if moe.config.family.competition == "token" else moe.config.capacity
            idle += expert_parameters * (1 - per_token / moe.config.total_experts)
        return total, round(total - idle)
