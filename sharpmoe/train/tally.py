"""Accumulate the figures of a rollout as sums over its steps, so that the records of a step can be freed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.moe.thresholds import threshold_candidates
from sharpmoe.rollout import StepOutput
from sharpmoe.train.metrics import routing_sums
from sharpmoe.train.terms import LossTerms, StepTerms, routing_loss


class StepRecord(NamedTuple):
    """The figures of one micro-batch, detached."""

    terms: LossTerms  # of the whole trajectory
    thresholds: Tensor | None  # (MoE layers, E) threshold candidates of families with thresholds, mean over T
    loads: Tensor | None  # (MoE layers, E) share of tokens that each expert took, if a bias balances the loads
    routing: Tensor | None  # (MoE layers, columns) `metrics.routing_sums` over T, if requested


class Tally:
    """Sums over the steps of one rollout. Each step calls `add_mass` once and `add` once.

    A step that is run twice calls `add_mass` in the first run and `add` in the second.
    """

    def __init__(self, run: RunConfig, with_routing: bool, saliency: Tensor, routing_weight: float) -> None:
        """Start with nothing. saliency (B, N): the maps M of the trajectories; routing_weight: of L_routing."""
        self.run, self.with_routing, self._saliency, self._weight = run, with_routing, saliency, routing_weight
        self.mass: Tensor | None = None  # (B, N) A so far, detached
        self._steps: list[Tensor] = []  # (3,) flow, router, heads
        self._totals: list[Tensor] = []
        self._thresholds: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._routing: Tensor | None = None

    def add_mass(self, mass: Tensor | None) -> None:
        """Add a step's summand (B, N) of A; None if L_routing does not apply."""
        if mass is not None:
            self.mass = mass.detach() if self.mass is None else self.mass + mass.detach()

    @torch.no_grad()
    def add(self, output: StepOutput, terms: StepTerms) -> None:
        """Add the other figures of a step, detached. The order of steps is free."""
        terms, model = terms.detach(), self.run.model
        self._totals.append(terms.total)
        self._steps.append(torch.stack([terms.flow, terms.router, terms.heads]))
        if not output.routing:
            return
        if model.family.thresholds is not None:
            self._thresholds.append(threshold_candidates(output.routing, model))
        if model.bias_balancing:
            self._loads.append(torch.stack([r.routing_map.float().mean((0, 1)) for r in output.routing]))
        if self.with_routing:
            sums = routing_sums([output.routing], model, output.t[None], self._saliency)
            self._routing = sums if self._routing is None else self._routing + sums

    def record(self) -> StepRecord:
        """Return the record of the trajectory."""
        flow, router, heads = torch.stack(self._steps).mean(0)
        routing = torch.zeros_like(flow)
        if self.mass is not None:
            routing = routing_loss(self.mass, self._saliency, self.run)
        total = torch.stack(self._totals).mean() + self._weight * routing
        terms = LossTerms(total=total, flow=flow, routing=routing, router=router, heads=heads)
        return StepRecord(terms, _mean(self._thresholds), _mean(self._loads), self._routing)


def _mean(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(parts)).mean(0) if parts else None
