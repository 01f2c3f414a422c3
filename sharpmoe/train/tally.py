"""What a rollout leaves behind, added up step by step, so that no record of a step outlives it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.config import POOLED, ModelConfig, RunConfig
from sharpmoe.moe.capacity import threshold_candidates
from sharpmoe.moe.routing import Routing
from sharpmoe.rollout import StepOutput
from sharpmoe.train.metrics import routing_sums
from sharpmoe.train.terms import LossTerms, StepTerms, routing_loss


class StepRecord(NamedTuple):
    """What a micro-batch leaves behind, cut from the graph."""

    terms: LossTerms  # of the whole trajectory
    thresholds: Tensor | None  # (MoE layers, E) threshold candidates of families that pool tokens, mean over T
    loads: Tensor | None  # (MoE layers, E) share of tokens that each expert took, where a bias balances them
    routing: Tensor | None  # (MoE layers, 4 + E) `routing_sums` over T, where they were asked for


class Tally:
    """Adds up the steps of one rollout, each given once: its mass, and the rest."""

    def __init__(self, run: RunConfig, with_routing: bool) -> None:
        self.run, self.with_routing = run, with_routing
        self.mass: Tensor | None = None  # (B, N) A so far, detached
        self._steps: list[Tensor] = []  # (3,) flow, balance, capacity
        self._totals: list[Tensor] = []
        self._thresholds: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._routing: Tensor | None = None

    def add_mass(self, mass: Tensor | None) -> None:
        """Take in a step's summand (B, N) of A; None where L_routing does not apply."""
        if mass is not None:
            self.mass = mass.detach() if self.mass is None else self.mass + mass.detach()

    @torch.no_grad()
    def add(self, output: StepOutput, terms: StepTerms) -> None:
        """Take in the rest of a step, in any order of steps; nothing of its graph is kept."""
        terms, model = terms.detach(), self.run.model
        self._totals.append(terms.total)
        self._steps.append(torch.stack([terms.flow, terms.balance, terms.capacity]))
        if not output.routing:
            return
        if model.router in POOLED:
            self._thresholds.append(_candidates(output.routing, model))
        if model.bias_balancing:
            self._loads.append(torch.stack([r.routing_map.float().mean((0, 1)) for r in output.routing]))
        if self.with_routing:
            sums = routing_sums([output.routing], model)
            self._routing = sums if self._routing is None else self._routing + sums

    def record(self, saliency: Tensor) -> StepRecord:
        """The record of the whole trajectory, whose map is `saliency` (B, N)."""
        flow, balance, capacity = torch.stack(self._steps).mean(0)
        routing, weight = torch.zeros_like(flow), self.run.loss.routing_weight
        if self.mass is not None:
            routing = routing_loss(self.mass, saliency, self.run)
        total = torch.stack(self._totals).mean() + weight * routing
        terms = LossTerms(total, flow, routing, balance, capacity)
        return StepRecord(terms, _mean(self._thresholds), _mean(self._loads), self._routing)


def _mean(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(parts)).mean(0) if parts else None


def _candidates(routing: Sequence[Routing], model: ModelConfig) -> Tensor:
    """Threshold candidates of all layers (layers, E): DiffMoE's k-th probabilities, Expert Race's k-th scores."""
    predicted = [record.capacity_logits for record in routing if record.capacity_logits is not None]
    if predicted:
        return threshold_candidates(predicted, model.capacity)
    return torch.stack([record.cutoff.flatten() for record in routing])
