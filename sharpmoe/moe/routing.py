"""Selection rules: which experts take which tokens. One pure function per family.

Every rule maps scores (B, N, E) to a routing map (B, N, E) bool. B images, N tokens per image, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
    similarity: Tensor | None = None  # (G, E, E) float32, of prototypes: see `prototype_similarity`
    prediction: Tensor | None = None  # (B, N, p p C) float32, the layer's own prediction of the target
    bias: Tensor | None = None  # (E,) float32, added to the scores for the choice only

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


def group_limited(scores: Tensor, top_k: int, num_groups: int, top_groups: int) -> Tensor:
    """Each token takes its top-k experts among those of its best `top_groups` groups (DeepSeek-V3, arXiv 2412.19437).

    A group is worth the sum of its two best experts. Experts outside count as 0, as in the published code, so that one
    of them may win where a bias made the inside negative.
    """
    if top_groups == num_groups:
        return token_choice(scores, top_k)
    groups = scores.unflatten(-1, (num_groups, -1))
    worth = groups.topk(2, dim=-1).values.sum(-1)
    inside = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(top_groups, dim=-1).indices, True)
    return token_choice(groups.masked_fill(~inside.unsqueeze(-1), 0).flatten(-2), top_k)


def race(scores: Tensor, capacity: float) -> Tensor:
    """All token-expert pairs of a call compete, the best B N * capacity are taken (Expert Race, arXiv 2503.16057)."""
    count = min(scores.numel(), max(1, int(scores.shape[0] * scores.shape[1] * capacity)))
    chosen = scores.flatten().topk(count).indices
    return torch.zeros_like(scores, dtype=torch.bool).flatten().scatter_(0, chosen, True).view(scores.shape)


def prototype_similarity(h: Tensor, routing_map: Tensor, cosine: Tensor, per_image: bool) -> Tensor:
    """Cosine of every expert's centre with the mean of every expert's tokens: (1, E, E), or (B, E, E) per image.

    h (B, N, D) tokens, routing_map (B, N, E) bool, cosine (B, N, E) of token to centre. Columns of experts without
    tokens are NaN. Feeds ProMoE's routing contrastive loss (arXiv 2510.24711, section 4.3); gradients reach tokens and
    centres. The centres themselves are not asked for: outside of their module ZeRO-3 may have taken them apart.
    """
    tokens, taken = h.to(cosine.dtype), routing_map.to(cosine.dtype)
    along = cosine * tokens.norm(dim=-1, keepdim=True)  # length of the token along each centre
    if not per_image:
        tokens, taken, along = (x.flatten(0, 1).unsqueeze(0) for x in (tokens, taken, along))
    is_idle = (taken.sum(1) == 0).unsqueeze(1)  # (G, 1, E)
    sums = taken.transpose(1, 2) @ tokens  # (G, E, D): the direction of the sum is that of the mean
    length = torch.where(is_idle.transpose(1, 2), 1, sums).norm(dim=-1)
    return (along.transpose(1, 2) @ taken / length.unsqueeze(1)).masked_fill(is_idle, torch.nan)


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


def predicted_count(scores: Tensor, capacity_logits: Tensor, threshold: Tensor, pools: int = 1) -> Tensor:
    """DiffMoE inference as ProMoE's code has it: expert e takes its n_e highest scores of a pool.

    n_e is the number of tokens whose predicted probability sigmoid(capacity_logits) exceeds `threshold` (E,).
    The batch is cut into `pools` equal parts, each a pool of its own: branches of classifier-free guidance, or images.
    """
    pooled = scores.reshape(pools, -1, scores.shape[-1])
    count = (capacity_logits.sigmoid() > threshold).reshape(pooled.shape).sum(1, keepdim=True)  # (pools, 1, E)
    best_first = pooled.argsort(dim=1, descending=True, stable=True)
    is_taken = torch.arange(pooled.shape[1], device=scores.device)[:, None] < count  # (pools, rank, E)
    return torch.zeros_like(is_taken).scatter_(1, best_first, is_taken).view(scores.shape)


def predicted_mask(capacity_logits: Tensor, threshold: Tensor) -> Tensor:
    """DiffMoE inference as the paper has it (Eq. 14): expert e takes exactly the tokens predicted above `threshold`."""
    return capacity_logits.sigmoid() > threshold


def lowest_accepted(scores: Tensor, routing_map: Tensor, pool: str) -> Tensor:
    """Lowest score each expert accepted. Detached.

    pool "image": (B, 1, E) of an image; "call": (1, 1, E) of the call; "all": the same, over all experts together.

    An expert without tokens gets +inf: nothing is near its threshold.
    """
    accepted = scores.detach().masked_fill(~routing_map, torch.inf)
    if pool == "image":
        return accepted.amin(dim=1, keepdim=True)
    lowest = accepted.amin(dim=(0, 1) if pool == "call" else (0, 1, 2), keepdim=True)
    return lowest.expand(1, 1, scores.shape[-1])
