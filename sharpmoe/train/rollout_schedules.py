"""The forms in which the rollout of one micro-batch is trained (docs/design/0003-rollout-schedules.md).

L_routing reaches the network only through A, a sum over steps. With w = dL_routing / dA known after a first pass, the
gradient is the sum over steps of that of L(step) / T + sum(w A_step), and steps can be trained one by one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sharpmoe.config import RunConfig
from sharpmoe.errors import ConfigError
from sharpmoe.families import tokens_per_expert
from sharpmoe.model.dit import DiT
from sharpmoe.rollout import (
    Replay,
    StepOutput,
    TrajectoryBatch,
    block_steps,
    first_x0_prev,
    replay,
    replay_steps,
    rollout_step,
)
from sharpmoe.train.tally import StepRecord, Tally
from sharpmoe.train.terms import StepTerms, has_routing_loss, mass_gradient, routing_loss, step_mass, step_terms


class Job(NamedTuple):
    """One micro-batch to be trained."""

    model: DiT
    item: TrajectoryBatch
    run: RunConfig
    uses_x0_prev: bool  # x0_hat is handed on
    block: int  # which segment, where segments are drawn
    with_routing: bool  # the record tells of the routing

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.item.times)


class Trained(NamedTuple):
    """A micro-batch of which one backward is left."""

    loss: Tensor  # 0-d; the backward that is left
    record: StepRecord


Train = Callable[[Tensor], None]  # takes the gradient of a loss at once and frees its graph


def run_schedule(job: Job, train: Train) -> Trained:
    """Run a micro-batch under the configured schedule: every backward but the last is `train`'s."""
    rollout = job.run.rollout
    assert rollout.schedule != "auto"  # `check_schedule`
    if job.run.stage == "pretrain" or rollout.schedule in ("plain", "checkpoint"):
        return _one_graph(job, recompute=rollout.schedule == "checkpoint")
    if rollout.schedule == "segments":
        return _two_pass(job, train, block_steps(job.num_steps, rollout.segment_steps, job.block))
    if not has_routing_loss(job.run) and rollout.merged_steps == 1:
        return _one_by_one(job, train)
    return _two_pass(job, train, range(job.num_steps))


def check_schedule(run: RunConfig, micro_batch: int) -> None:
    """Raise a ConfigError where the schedule cannot be run on micro-batches of so many images; no communication."""
    model, merged = run.model, run.rollout.merged_steps
    if run.rollout.schedule == "auto":
        raise ConfigError("rollout.schedule is auto, which launcher/train.py settles; set it to what is wanted here")
    if merged == 1:
        return
    if model.contrasts_calls:
        raise ConfigError(
            f"rollout.merged_steps is {merged}, but {model.router} compares the tokens of a whole call; set it to 1"
        )
    pool = micro_batch * model.num_tokens
    one, together = (tokens_per_expert(n * pool, model.num_experts, model.capacity) for n in (1, merged))
    if model.family.competition == "call" and together != merged * one:
        raise ConfigError(
            f"rollout.merged_steps is {merged}, but {pool} tokens * capacity {model.capacity} do not split evenly over "
            f"{model.num_experts} experts; set it to 1, or change train.micro_batch"
        )


def _one_graph(job: Job, recompute: bool) -> Trained:
    """All steps in one graph; `recompute`: it holds the inputs of blocks only."""
    tally, parts = Tally(job.run, job.with_routing), []
    x0_prev = first_x0_prev(job.item, job.uses_x0_prev)
    for step in range(job.num_steps):
        output = rollout_step(job.model, job.item, step, x0_prev, recompute)
        parts.append(_tallied(tally, output, job.run))
        x0_prev = output.x0_hat if job.uses_x0_prev else None
    loss = torch.stack([part.total for part in parts]).mean()
    masses = [part.mass for part in parts if part.mass is not None]
    if masses:
        mass = torch.stack(masses).sum(0)
        loss = loss + job.run.loss.routing_weight * routing_loss(mass, job.item.saliency, job.run)
    return Trained(loss, tally.record(job.item.saliency))


def _one_by_one(job: Job, train: Train) -> Trained:
    """Without a routing loss nothing is known only at the end: each step is trained as soon as it is run."""
    tally = Tally(job.run, job.with_routing)
    x0_prev = first_x0_prev(job.item, job.uses_x0_prev)
    for step in range(job.num_steps):
        output = rollout_step(job.model, job.item, step, x0_prev)
        loss = _tallied(tally, output, job.run).total / job.num_steps
        x0_prev = output.x0_hat if job.uses_x0_prev else None
        del output
        if step < job.num_steps - 1:
            train(loss)
    return Trained(loss, tally.record(job.item.saliency))


def _two_pass(job: Job, train: Train, trained: range) -> Trained:
    """Run all steps, keeping the graphs of the last of `trained`; then run again those of `trained` before them.

    Of what is run again the first pass needs the routing and x0_hat only: losses and their heads wait for the second.
    """
    item, tally = job.item, Tally(job.run, job.with_routing)
    kept = trained[len(trained) - job.run.rollout.steps_kept :]
    again = trained[: len(trained) - len(kept)]
    replays: list[Replay] = []
    parts: list[StepTerms] = []
    x0_prev = first_x0_prev(item, job.uses_x0_prev)
    for step in range(job.num_steps):
        with torch.set_grad_enabled(step in kept):
            output = rollout_step(job.model, item, step, x0_prev, for_losses=step not in again)
            if step in again:
                tally.add_mass(step_mass(output.routing, job.run))
                replays.append(replay(output, x0_prev))
            elif step in kept:
                parts.append(_tallied(tally, output, job.run))
            else:
                _tallied(tally, output, job.run)
        x0_prev = output.x0_hat if job.uses_x0_prev else None
    del output
    second = _Second(job, tally, mass_gradient(tally.mass, item.saliency, job.run), len(trained))
    work = [partial(second.loss, parts)] if parts else []
    size = job.run.rollout.merged_steps
    work += [
        partial(second.replayed, again[at : at + size], replays[at : at + size]) for at in range(0, len(again), size)
    ]
    for loss_of in work[:-1]:
        train(loss_of())
    return Trained(work[-1](), tally.record(item.saliency))


class _Second(NamedTuple):
    """What the steps of a second pass share."""

    job: Job
    tally: Tally
    mass_weight: Tensor | None  # (B, N) w
    num_trained: int  # T, or S of a segment

    def replayed(self, steps: Sequence[int], replays: Sequence[Replay]) -> Tensor:
        """The loss of some steps, run again in one batch."""
        outputs = replay_steps(self.job.model, self.job.item, steps, replays)
        parts = [step_terms(output, self.job.run) for output in outputs]
        for output, terms in zip(outputs, parts, strict=True):
            self.tally.add(output, terms)
        return self.loss(parts)

    def loss(self, parts: list[StepTerms]) -> Tensor:
        """The loss of some steps whose graphs are there; `parts` is emptied, so that nothing else holds them."""
        total = torch.stack([part.total for part in parts]).sum() / self.num_trained
        if self.mass_weight is not None:
            mass = torch.stack([part.mass for part in parts if part.mass is not None]).sum(0)
            total = total + self.job.num_steps / self.num_trained * (self.mass_weight * mass).sum()
        parts.clear()
        return total


def _tallied(tally: Tally, output: StepOutput, run: RunConfig) -> StepTerms:
    terms = step_terms(output, run)
    tally.add_mass(terms.mass)
    tally.add(output, terms)
    return terms
