"""The same training steps under the engine and in plain torch on one process."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from data_pipeline.read.stream import stream
from sharpmoe.config import RunConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.moe.thresholds import update_thresholds
from sharpmoe.parallel.ranks.launch import World
from sharpmoe.parallel.zero.ema import ShardEma
from sharpmoe.parallel.zero.engine import Engine
from sharpmoe.parallel.zero.patches import Admit, Update
from sharpmoe.parallel.zero.placement import gather_experts, is_expert
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.setup import RunPlan
from sharpmoe.train.step import StepResult, _learning_rate, _trained_segment, train_step
from sharpmoe.train.trajectories import draw_trajectories
from tests.train.setting import ALONE, plan_for, stirred_model, worst

Prepare = Callable[[Backbone], Backbone]


def unchanged(model: Backbone) -> Backbone:
    return model


class Trace(NamedTuple):
    """What some steps left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]  # thresholds included
    average: dict[str, Tensor]  # EMA
    gradients: dict[str, Tensor]  # of the first step, before clipping


class Case(NamedTuple):
    """One engine run."""

    run: RunConfig
    stage: int = 3
    steps: int = 10
    prepare: Prepare = unchanged  # of the model, before the first step


def with_engine(world: World, cases: dict[str, Case]) -> dict[str, Trace]:
    """Train every case under the engine; weights are whole on rank 0, empty elsewhere."""
    return {name: one_case(world, case) for name, case in cases.items()}


def one_case(world: World, case: Case) -> Trace:
    plan = plan_for(case.run, world, case.stage)
    objective = Objective(case.prepare(stirred_model(case.run)), case.run)
    engine = Engine(objective, case.run, plan.ds_config, world)
    ema = ShardEma(engine, case.run.optim.ema_decay)
    taken: dict[str, Tensor] = {}
    results: list[StepResult] = []
    for step, items in enumerate(items_of(plan, world, case.steps)):
        engine, cutoffs = watched(engine, objective, taken), results[-1].cutoffs if results else ()
        results.append(train_step(engine, objective, ema, items, step, with_routing=False, cutoffs=cutoffs))
    weights, average = engine.full_weights(objective.model), ema.full_weights(objective.model)
    return Trace([r.losses["total"] for r in results], [r.grad_norm for r in results], weights, average, taken)


def watched(engine: Engine, objective: Objective, taken: dict[str, Tensor]) -> Engine:
    """The engine, which in its first step lays whole gradients into `taken`."""
    if taken:
        engine.__dict__.pop("step", None)
        return engine

    def step(lr: float, admit: Admit) -> Update:
        trained = [(name, each) for name, each in objective.model.named_parameters() if each.requires_grad]
        for name, parameter in trained:
            gradient = safe_get_full_grad(parameter).float()
            taken[name] = gather_experts(gradient, engine._experts) if is_expert(parameter) else gradient.clone()
        return Engine.step(engine, lr, admit)

    engine.__dict__["step"] = step
    return engine


def items_of(plan: RunPlan, world: World, steps: int) -> list[list]:
    batches = stream(
        plan.data.train,
        seed=plan.run.seed,
        global_batch=plan.batch.global_batch,
        micro_batch=plan.batch.micro_batch,
        rank=world.rank,
        world=world.size,
    )
    taken = itertools.islice(batches, steps)
    return [draw_trajectories(loaded.batches, plan.data.empty_text, plan.run, world.device) for loaded in taken]


def with_plain_torch(run: RunConfig, steps: int = 10, prepare_model: Prepare = unchanged) -> Trace:
    """The reference: no engine, accumulation by hand."""
    plan = plan_for(run, ALONE)
    objective = Objective(prepare_model(stirred_model(run)), run).train()
    model, parameters = objective.model, list(objective.parameters())
    factors = [factor_of(name, run.optim.lr_scale) for name, _ in objective.named_parameters()]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=run.optim.lr)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses, norms, taken, cutoffs = [], [], {}, None
    for step, items in enumerate(items_of(plan, ALONE, steps)):
        optimizer.zero_grad()
        warmup = run.loss.routing_warmup_steps
        weight = run.loss.routing_weight * (min(1.0, step / warmup) if warmup else 1.0)
        segment = _trained_segment(run, step)
        answer = objective(StepRequest(tuple(items), segment, routing_weight=weight, cutoffs=cutoffs))
        answer.loss.backward()
        records = answer.records
        taken = taken or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, run.optim.clip_norm)))
        losses.append(float(torch.stack([r.terms.total for r in records]).mean()))
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * _learning_rate(run.optim, step, run.train.steps)
        optimizer.step()
        if records[0].thresholds is not None:
            candidates = torch.stack([r.thresholds for r in records]).mean(0)
            update_thresholds([m.expert_threshold for m in model.moe_layers()], candidates, run.optim.threshold_decay)
        if records[0].cutoffs is not None:
            found, decay = torch.stack([r.cutoffs for r in records]).mean(0), run.optim.threshold_decay
            cutoffs = found if cutoffs is None else decay * cutoffs + (1 - decay) * found
        for name, value in model.state_dict().items():
            average[name] = value.clone() if "threshold" in name else average[name].lerp(value, 1 - run.optim.ema_decay)
    return Trace(losses, norms, dict(model.state_dict()), average, taken)


def factor_of(name: str, lr_scale: dict[str, float]) -> float:
    """The factor of the longest pattern; here each is plain text that occurs in the name."""
    return lr_scale[max(found, key=len)] if (found := [text for text in lr_scale if text in name]) else 1.0


def assert_same(trace: Trace, reference: Trace) -> None:
    assert max(abs(a - b) for a, b in zip(trace.losses, reference.losses, strict=True)) < 1e-5
    assert max(abs(a - b) / b for a, b in zip(trace.norms, reference.norms, strict=True)) < 1e-4
    assert worst(trace.weights, reference.weights) < 1e-5
    assert worst(trace.average, reference.average) < 1e-5
    assert max(reference.norms) > 0.5  # clipping was active
    for name, gradient in reference.gradients.items():
        assert float((trace.gradients[name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()) + 1e-9, name
