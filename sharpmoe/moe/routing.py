"""Selection rules: which experts take which tokens. One pure function per family.

Every rule maps scores (B, N, E) to a routing map (B, N, E) bool. B images, N tokens per image, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What one MoE layer decided in one call. A NamedTuple, because ZeRO-3 hooks see tensors only inside tuples."""

    gate_logits: Tensor  # (B, N, E) float32, of the pretrained gate alone
    logits: Tensor  # (B, N, E) float32, gate + saliency router
    scores: Tensor  # (B, N, E) float32, softmax of the logits over experts
    gates: Tensor  # (B, N, E) float32, the score where the expert took the token, else 0
    routing_map: Tensor  # (B, N, E) bool
    cutoff: Tensor  # (B or 1, 1, E) float32, detached: lowest score each expert accepted in its pool
    capacity_logits: Tensor | None  # (B, N, E) float32, DiffMoE's capacity predictor

    def detach(self) -> "Routing":
        """Return the same record cut from the graph."""
        capacity_logits = None if self.capacity_logits is None else self.capacity_logits.detach()
        return Routing(
            self.gate_logits.detach(),
            self.logits.detach(),
            self.scores.detach(),
            self.gates.detach(),
            self.routing_map,
            self.cutoff,
            capacity_logits,
        )


def token_choice(scores: Tensor, top_k: int) -> Tensor:
    """Each token takes its top-k experts (Switch, arXiv 2101.03961; TC-DiT of ProMoE, arXiv 2510.24711)."""
    chosen = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def tokens_per_expert(num_pooled: int, num_experts: int, capacity: float) -> int:
    """Tokens that each expert takes out of a pool of `num_pooled`: floor(pool / E * capacity), at least one."""
    return max(1, int(num_pooled / num_experts * capacity))


def expert_choice(scores: Tensor, capacity: float) -> Tensor:
    """Per image, each expert takes its top N / E * capacity tokens (EC-DiT, arXiv 2410.02098)."""
    count = tokens_per_expert(scores.shape[1], scores.shape[2], capacity)
    chosen = scores.topk(count, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def batch_pool(scores: Tensor, capacity: float) -> Tensor:
    """Each expert takes its top B N / E * capacity tokens of the whole call (DiffMoE training, arXiv 2503.14487)."""
    return expert_choice(scores.reshape(1, -1, scores.shape[-1]), capacity).view(scores.shape)


def predicted_count(scores: Tensor, capacity_logits: Tensor, threshold: Tensor) -> Tensor:
    """DiffMoE inference as ProMoE's code has it: expert e takes its n_e highest scores of the call.

    n_e is the number of tokens whose predicted probability sigmoid(capacity_logits) exceeds `threshold` (E,).
    The pool is the call: sampling makes one call per guidance branch.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    count = (capacity_logits.sigmoid() > threshold).flatten(0, 1).sum(0)  # (E,)
    rank = flat.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return (rank < count).view(scores.shape)


def predicted_mask(capacity_logits: Tensor, threshold: Tensor) -> Tensor:
    """DiffMoE inference as the paper has it (Eq. 14): expert e takes exactly the tokens predicted above `threshold`."""
    return capacity_logits.sigmoid() > threshold


def lowest_accepted(scores: Tensor, routing_map: Tensor, per_image: bool) -> Tensor:
    """Lowest score each expert accepted: (B, 1, E) per image, or (1, 1, E) over the call. Detached.

    An expert without tokens gets +inf: nothing is near its threshold.
    """
    accepted = scores.detach().masked_fill(~routing_map, torch.inf)
    return accepted.amin(dim=1, keepdim=True) if per_image else accepted.amin(dim=(0, 1), keepdim=True)
