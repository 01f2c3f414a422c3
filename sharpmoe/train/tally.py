"""Accumulate the figures of a rollout as sums over its steps, so that the records of a step can be freed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.moe.routing import Routing
from sharpmoe.moe.thresholds import TrajectoryPool, threshold_candidates
from sharpmoe.rollout import StepOutput
from sharpmoe.train.metrics import routing_sums
from sharpmoe.train.terms import LossTerms, StepTerms, routing_loss


class StepRecord(NamedTuple):
    """The figures of one micro-batch, detached."""

    terms: LossTerms  # of the whole trajectory
    thresholds: Tensor | None  # (MoE layers, E) candidates of thresholds: mean over T, or of the pool
    loads: Tensor | None  # (MoE layers, E) share of tokens that each expert took, if a bias balances the loads
    routing: Tensor | None  # (MoE layers, columns) `metrics.routing_sums` over T, if requested
    cutoffs: Tensor | None  # (MoE layers, E) candidates for the next step, where the steps of a trajectory are a pool


class Tally:
    """Sums over the steps of one rollout. Each step calls `add_choice` once, and `add` once if it is trained.

    A step that is run twice calls `add_choice` in the first run and `add` in the second.
    """

    def __init__(
        self, run: RunConfig, with_routing: bool, saliency: Tensor, routing_weight: float, by_cutoff: bool
    ) -> None:
        """Start with nothing. saliency (B, N): the maps M of the trajectories; routing_weight: of L_routing.

        by_cutoff: experts take what reaches their cutoffs, not a quota.
        """
        self._by_cutoff = by_cutoff
        self.run, self.with_routing, self._saliency, self._weight = run, with_routing, saliency, routing_weight
        self.mass: Tensor | None = None  # (B, N) A so far, detached
        self._steps: list[Tensor] = []  # (3,) flow, router, heads
        self._totals: list[Tensor] = []
        self._thresholds: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._routing: Tensor | None = None
        self._pool = TrajectoryPool(run.model) if pools_trajectories(run) else None

    @torch.no_grad()
    def add_choice(self, records: Sequence[Routing], mass: Tensor | None) -> None:
        """Add what a step chose: a record per MoE layer, and its summand (B, N) of A; None: no L_routing applies."""
        if self._pool is not None:
            self._pool.add_scores(records)
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
        if self._pool is not None:
            self._pool.add_capacity(output.routing)
        elif model.family.thresholds is not None:
            self._thresholds.append(threshold_candidates(output.routing, model))
        if model.bias_balancing:
            self._loads.append(torch.stack([r.routing_map.float().mean((0, 1)) for r in output.routing]))
        if self.with_routing:
            by_cutoff = self._by_cutoff
            sums = routing_sums([output.routing], model, output.t[None], self._saliency, by_cutoff=by_cutoff)
            self._routing = sums if self._routing is None else self._routing + sums

    def record(self) -> StepRecord:
        """Return the record of the trajectory."""
        flow, router, heads = torch.stack(self._steps).mean(0)
        routing = torch.zeros_like(flow)
        if self.mass is not None:
            routing = routing_loss(self.mass, self._saliency, self.run)
        total = torch.stack(self._totals).mean() + self._weight * routing
        terms = LossTerms(total=total, flow=flow, routing=routing, router=router, heads=heads)
        thresholds, cutoffs = _mean(self._thresholds), None
        if self._pool is not None:
            thresholds, cutoffs = self._pool.candidates()
        return StepRecord(terms, thresholds, _mean(self._loads), self._routing, cutoffs)


def pools_trajectories(run: RunConfig) -> bool:
    """Whether the tokens of all steps of a trajectory compete, by cutoffs that are moved once per optimizer step."""
    asked = run.stage == "posttrain" and run.rollout.pool == "trajectory" and run.model.family.pools_calls
    return asked and run.model.num_moe_layers > 0


def _mean(parts: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(parts)).mean(0) if parts else None
