"""The record of what one MoE layer decided in one call, and how its scores come from logits."""

from typing import NamedTuple

from torch import Tensor


class CallMode(NamedTuple):
    """How one model call is made. A NamedTuple, because ZeRO-3 hooks see tensors only inside tuples."""

    recompute: bool = False  # keep only the inputs of blocks for backward, and run each block again there
    pools: int = 1  # equal parts of the batch whose tokens DiffMoE counts and ranks apart in inference
    for_losses: bool = True  # in training, compute what only losses and thresholds read; else those fields stay None
    steering: bool = False  # with for_losses: also the scores by which a loss trains the saliency routers alone
    routing_maps: tuple[Tensor, ...] | None = None  # per MoE layer (B, N, E) bool: choices to replay, none are made
    # Per MoE layer (E,): in training, experts take the tokens whose score reaches it, instead of competing for a quota.
    cutoffs: tuple[Tensor, ...] | None = None

    def for_layer(self, index: int) -> "CallMode":
        """The mode as MoE layer `index` (in depth order) gets it: with its own routing map and cutoffs alone."""
        if self.routing_maps is None and self.cutoffs is None:
            return self
        maps, cutoffs = (None if each is None else (each[index],) for each in (self.routing_maps, self.cutoffs))
        return self._replace(routing_maps=maps, cutoffs=cutoffs)

    @property
    def replayed(self) -> Tensor | None:
        """The choice (B, N, E) that a layer replays: in half precision a near-tie can flip between two passes."""
        return None if self.routing_maps is None else self.routing_maps[0]

    @property
    def cutoff(self) -> Tensor | None:
        """The scores (E,) from which on a layer's experts take tokens in training; None: its rule chooses."""
        return None if self.cutoffs is None else self.cutoffs[0]


class Routing(NamedTuple):
    """What one MoE layer decided in one call. A NamedTuple, because ZeRO-3 hooks see tensors only inside tuples.

    E counts the unconditional expert, where there is one, as the last; logits have no column for it.
    """

    gate_logits: Tensor  # (B, N, E) float32, of the pretrained gate alone
    logits: Tensor  # (B, N, E) float32, gate + saliency router
    scores: Tensor  # (B, N, E) float32, of the logits: softmax, sigmoid or themselves
    gates: Tensor  # (B, N, E) float32, the (renormalised, scaled) score where the expert took the token, else 0
    routing_map: Tensor  # (B, N, E) bool
    cutoff: Tensor  # (B or 1, 1, E) float32, detached: lowest score each expert accepted in its pool
    capacity_logits: Tensor | None = None  # (B, N, E) float32, DiffMoE's capacity predictor
    similarity: Tensor | None = None  # (G, E, E) float32, of prototypes and mean tokens: of ProMoE's contrast
    prediction: Tensor | None = None  # (B, N, p p C) float32, the layer's own prediction of the target
    bias: Tensor | None = None  # (E,) float32, added to the scores for the choice only
    steering: Tensor | None = None  # (B, N, E) float32, the scores, with a gradient for the saliency router alone

    def detach(self) -> "Routing":
        """Return the same record cut from the graph."""
        return Routing(*(None if field is None else field.detach() for field in self))  # type: ignore[arg-type]


def score_logits(logits: Tensor, kind: str) -> Tensor:
    """Turn logits (B, N, E) into scores of the same shape.

    softmax over experts; sigmoid (DeepSeek-V3, arXiv 2412.19437); identity (Expert Race, ProMoE); token_softmax over
    the tokens of an image (an option of ProMoE's expert choice).
    """
    if kind == "softmax":
        return logits.softmax(-1)
    if kind == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(1) if kind == "token_softmax" else logits
