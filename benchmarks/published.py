"""References for benchmarks: MoE layers in the form of the papers and their code, on the same weights.

Gates are computed by our router (float32), so that both make the same choices. In bf16 a published layer runs as
ali-vilab/ProMoE (train.py) and yhlleo/EfficientMoE (train_fsdp.py) train it: weights and tokens in float32, products in
bf16 by autocast. So its gates and its output buffer are float32, and every call casts every weight.
"""

import copy
from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpmoe.families import tokens_per_expert
from sharpmoe.model.backbone import Backbone
from sharpmoe.moe.experts import Experts, Mlp
from sharpmoe.moe.layer import MoELayer
from sharpmoe.moe.routing import Routing

Named = dict[str, Tensor]
THRESHOLD_DECAY = 0.95


class Published(nn.Module, ABC):
    """A layer in a published form, built from one of ours: float32, with autocast products in the dtype of ours."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.config, self.precision = layer.config, layer.experts.w1.dtype
        self.gate = copy.deepcopy(layer.gate)

    def forward(self, h: Tensor, *rest: object) -> tuple[Tensor, Routing | None]:
        """Map tokens h (B, N, D) to y (B, N, D) and the routing record; other arguments of our layer are ignored."""
        scores = self.gate(h).softmax(-1)
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            y, record = self.serve(h.float(), scores)
        return y.to(h.dtype), record

    @abstractmethod
    def serve(self, h: Tensor, scores: Tensor) -> tuple[Tensor, Routing | None]:
        """Compute y in float32, given the scores (B, N, E) of all tokens."""


class PublishedDiffMoE(Published):
    """DiffMoE (arXiv 2503.14487; KwaiVGI/DiffMoE): every expert is a module and takes its top-k tokens of the batch.

    Its rows are indexed from the tensor of all tokens, so the backward of each expert creates a gradient as large as
    that tensor. The gated outputs are scattered into a buffer of experts x tokens x width, which is summed over
    experts. In training a forward also updates the thresholds, expert by expert.
    """

    expert_threshold: Tensor

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(layer)
        assert layer.capacity_predictor is not None
        self.capacity_predictor = copy.deepcopy(layer.capacity_predictor)
        self.experts = nn.ModuleList(single_experts(layer.experts))
        self.register_buffer("expert_threshold", torch.zeros_like(layer.expert_threshold))
        self.float()

    def serve(self, h: Tensor, scores: Tensor) -> tuple[Tensor, Routing]:
        capacity_logits = self.capacity_predictor(h)
        flat, pool = h.flatten(0, 1), scores.flatten(0, 1)
        tokens, num_experts = pool.shape
        gates, index = pool.t().topk(tokens_per_expert(tokens, num_experts, self.config.capacity), dim=-1)
        taken = flat[index]  # (E, k, D)
        answers = torch.stack([expert(taken[number]) for number, expert in enumerate(self.experts)])
        answers = (answers * gates.unsqueeze(-1)).flatten(0, 1)
        first = torch.arange(num_experts, device=index.device).unsqueeze(1) * tokens  # row of each expert's first token
        rows = (index + first).view(-1, 1).expand_as(answers)
        buffer = answers.new_zeros(num_experts * tokens, flat.shape[1])
        y = buffer.scatter(0, rows, answers).view(num_experts, *flat.shape).sum(0)
        self._move_thresholds(capacity_logits.detach().flatten(0, 1).sigmoid(), index.shape[1])
        chosen = torch.zeros_like(pool.t(), dtype=torch.bool).scatter(1, index, True).t().view(scores.shape)
        nothing = scores.new_empty(0)  # fields that neither this form nor its losses use
        return y.view_as(h), Routing(nothing, nothing, scores, nothing, chosen, nothing, capacity_logits)

    def _move_thresholds(self, probabilities: Tensor, count: int) -> None:
        for expert in range(self.config.num_experts):
            lowest = probabilities[:, expert].topk(count).values[-1]
            old = self.expert_threshold[expert]
            self.expert_threshold[expert] = old * THRESHOLD_DECAY + (1 - THRESHOLD_DECAY) * lowest


class OneHotExpertChoice(Published):
    """Expert choice (arXiv 2202.09368; EC-DiT, arXiv 2410.02098): dispatch and combine are products with one-hots.

    Per image each expert takes its top tokens; P (B, E, C, N) is one where a token fills one of its C places.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(layer)
        self.experts = copy.deepcopy(layer.experts)
        self.float()

    def serve(self, h: Tensor, scores: Tensor) -> tuple[Tensor, None]:
        gates, places = one_hot_places(scores, self.config.capacity, h.dtype)
        taken = torch.einsum("becn,bnd->ebcd", places, h)
        answers = batched_experts(self.experts, taken.flatten(1, 2)).view_as(taken)
        return torch.einsum("becn,bec,ebcd->bnd", places, gates, answers), None


def one_hot_places(scores: Tensor, capacity: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return gates (B, E, C) and one-hot places (B, E, C, N) of expert choice by scores (B, N, E)."""
    count = tokens_per_expert(scores.shape[1], scores.shape[2], capacity)
    gates, index = scores.transpose(1, 2).topk(count, dim=-1)
    return gates.to(dtype), functional.one_hot(index, scores.shape[1]).to(dtype)


def batched_experts(experts: Experts, rows: Tensor) -> Tensor:
    """Return the outputs of stacked GELU experts for rows (E, C, D), as einsum code computes them."""
    b1, b2 = experts.w3.split([experts.hidden, experts.width], dim=-1)
    inner = functional.gelu(torch.einsum("ecd,efd->ecf", rows, experts.w1) + b1, approximate="tanh")
    return torch.einsum("ecf,edf->ecd", inner, experts.w2) + b2


def single_experts(experts: Experts) -> list[Mlp]:
    """Return the stacked GELU experts as one module each."""
    singles = []
    for w1, w2, w3 in zip(experts.w1, experts.w2, experts.w3, strict=True):
        single = Mlp(experts.width, experts.hidden).to(device=w1.device, dtype=w1.dtype)
        with torch.no_grad():
            for target, value in (
                (single.fc1.weight, w1),
                (single.fc2.weight, w2),
                (single.fc1.bias, w3[0, : experts.hidden]),
                (single.fc2.bias, w3[0, experts.hidden :]),
            ):
                target.copy_(value)
        singles.append(single)
    return singles


def published_model(model: Backbone) -> Backbone:
    """Return a copy of a DiffMoE model with MoE layers in the published form."""
    layers = {id(layer): PublishedDiffMoE(layer) for layer in model.moe_layers()}
    twin = copy.deepcopy(model, cast(dict[int, object], dict(layers)))
    assert all(isinstance(block.moe, PublishedDiffMoE | None) for block in twin.blocks)
    return twin


def stacked(named: Named) -> Named:
    """Convert parameters or gradients from published names to ours: experts stacked, their biases joined."""
    ours: Named = {}
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for name, value in named.items():
        prefix, _, rest = name.rpartition("experts.")
        number, _, leaf = rest.partition(".")
        if number.isdigit():
            parts.setdefault(f"{prefix}experts.", {}).setdefault(leaf, []).append(value)
        else:
            ours[name] = value
    for prefix, leaves in parts.items():
        whole = {leaf: torch.stack(values) for leaf, values in leaves.items()}
        ours[f"{prefix}w1"], ours[f"{prefix}w2"] = whole["fc1.weight"], whole["fc2.weight"]
        ours[f"{prefix}w3"] = torch.cat([whole["fc1.bias"], whole["fc2.bias"]], -1).unsqueeze(1)
    return ours


def gradients(module: nn.Module) -> Named:
    """Return gradients by name; zeros for parameters without one."""
    named = module.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def assert_close(got: Named, expected: Named, tolerance: float) -> None:
    """Raise AssertionError unless every tensor is within `tolerance` of the largest expected magnitude."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, value in expected.items():
        difference = (got[name].double() - value.double()).abs().max()
        assert difference <= tolerance * value.double().abs().max().clamp_min(1e-6), (name, float(difference))
