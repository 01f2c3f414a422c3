"""The contract between a network and everything that trains, samples, evaluates or plans it.

Rollout, losses, sampling, evaluation, the engine, planning and checkpoints use a model through `Backbone` and refer to
none of its subclasses; `sharpmoe.model.build.build_model` creates one. A backbone has no code for parallelism: the
dispatcher of each MoE layer sends tokens to the ranks that hold the experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sharpmoe.config import ModelConfig
from sharpmoe.model.initial import InitialRules
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import CallMode, Routing


class ClassCondition(NamedTuple):
    """Class-conditional input."""

    labels: Tensor  # (B,) int64; num_classes means "no class"


class TextCondition(NamedTuple):
    """Text-conditional input."""

    tokens: Tensor  # (B, L, D_text) token states
    mask: Tensor  # (B, L) bool, True for real tokens, False for padding
    pooled: Tensor | None = None  # (B, D_pooled), where the backbone reads it


Condition = ClassCondition | TextCondition


def map_condition(condition: Condition, function: Callable[[Tensor], Tensor]) -> Condition:
    """Apply a function to every tensor of a condition."""
    return type(condition)(*(None if part is None else function(part) for part in condition))  # type: ignore[arg-type]


# What a backbone computes from a condition alone: a NamedTuple that each backbone defines and no other code reads.
Prepared = tuple[Any, ...]


class ModelOutput(NamedTuple):
    """What one denoising call returns."""

    v: Tensor  # (B, C, [T,] H, W) predicted velocity, float32 or better
    routing: tuple[Routing, ...]  # one per MoE layer, in depth order; empty for a dense model


class Backbone(nn.Module, ABC):
    """A denoising network with MoE layers. Its forward has no side effects."""

    config: ModelConfig
    # Codec and text encoder that it was trained with, as the header of its weights file names them; empty: not known.
    origin: Mapping[str, str] = MappingProxyType({})
    initial: InitialRules = InitialRules()  # of its initial values
    blocks: nn.ModuleList  # in the order of use: each is compiled and recomputed as one unit, and counted so in plans

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

        x_t need not have the configured size: H and W are multiples of the patch, else ValueError, and all that counts
        tokens (capacities, positions, records) follows its grid. Where `config.takes_frames`, x_t may be
        (B, C, T, H, W), of any number of frames: tokens are those of all frames, and attend to all.
        condition: what the model is conditioned on, or what `prepare` returned for it; a bare tensor (B,) is read as
        class labels; TypeError if it is of a kind that the model does not use. x0_prev, of x_t's shape: clean latent
        predicted by the previous step, detached here; the saliency routers read it, and None gives the base routing.
        Communicates only if dispatchers or pools of its MoE layers do.
        """

    @abstractmethod
    def prepare(self, condition: Condition) -> Prepared:
        """Compute once, bit for bit, what forward would compute from a condition at every step.

        Call it only on a model that ZeRO-3 does not partition: it reads parameters outside of the forwards of the
        modules that hold them, where ZeRO-3 does not gather them. No communication.
        """

    @abstractmethod
    def gathered_units(self) -> list[tuple[str, nn.Module]]:
        """Return the modules whose parameters ZeRO-3 gathers as one unit, with their names in this module.

        They are in the order in which forward uses them, and each parameter of the model is in exactly one of them. The
        first embeds x_t and x0_prev; the last computes the output.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the whole model as `nn.Module` does, but round no buffer to half precision.

        Thresholds, balancing biases and positions keep theirs where parameters become bf16, by `.to` or otherwise.
        """
        before = dict(self.named_buffers(remove_duplicate=False))
        super()._apply(fn, recurse)
        for name, cast in list(self.named_buffers(remove_duplicate=False)):
            exact = before[name]
            if cast.is_floating_point() and cast.itemsize < 4 <= exact.itemsize:
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, exact.to(cast.device))
        return self

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in depth order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def count_parameters(self) -> tuple[int, int]:
        """Count parameters as published figures do: (total, active per token). Thresholds and biases do not count.

        Of an expert, the fraction of tokens that it takes on average counts as active.
        """
        total = sum(p.numel() for p in self.parameters())
        idle = 0.0
        for moe in self.moe_layers():
            expert_parameters = sum(p.numel() for p in moe.experts.parameters())
            per_token = moe.config.top_k if moe.config.family.competition == "token" else moe.config.capacity
            idle += expert_parameters * (1 - per_token / moe.config.total_experts)
        return total, round(total - idle)


def recomputed(block: nn.Module, *inputs: Any) -> Any:
    """Call a block so that only its inputs are kept for the backward, where it runs again.

    Non-reentrant: the reentrant form gives wrong gradients under ZeRO-3. States of the random generators are not kept,
    as no block draws random numbers.
    """
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
