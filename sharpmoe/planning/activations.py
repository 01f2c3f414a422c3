"""Bytes that a rollout keeps until a backward, counted by running the objective on tensors without storage.

`Objective` runs under torch's fake tensors: the same operators, shapes, dtypes and views as in training on a host, and
no memory. Counted are the unique storages that autograd saves or the call returns, without the parameters and the
call's inputs. Kernels of a device may save a few tensors of another size (statistics of attention and norms).

Where the steps of a trajectory are one pool (`rollout.pool: trajectory`), an expert takes more rows in one step than in
another. Planned is not the bound, all tokens for every expert, but what was measured (docs/planning.md): every step
as the fullest one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sharpmoe.config import ModelConfig, RunConfig
from sharpmoe.families import rows_of_call
from sharpmoe.model.backbone import Backbone, ClassCondition, Condition, TextCondition
from sharpmoe.model.trainable import planned_model
from sharpmoe.moe.dispatch import Assignment, Dispatched, LocalDispatcher, RowCounts
from sharpmoe.rollout import TrajectoryBatch, first_x0_prev, replay, rollout_step
from sharpmoe.train.objective import Objective, StepRequest
from sharpmoe.train.rollout_schedules import Pass, RolloutSchedule, with_schedule
from sharpmoe.train.tally import pools_trajectories

_SCORE = 4  # bytes of a score: routers compute in float32
# Rows of the fullest step of a trajectory, and of one layer in it, over those that the rule gives a step on average.
FULLEST_STEP, FULLEST_LAYER = 1.15, 1.35


class _LinearBytes(NamedTuple):
    """Bytes as a function of the rollout steps in a graph."""

    base: int
    per_step: int

    def at(self, steps: int) -> int:
        """Return the bytes of so many steps."""
        return self.base + steps * self.per_step


class Activations(NamedTuple):
    """Bytes that one micro-batch keeps on a rank."""

    kept: _LinearBytes  # a graph that keeps everything
    inputs: _LinearBytes  # a graph that keeps the inputs of blocks
    replay: int  # what one step without a graph leaves for its second run: x0_prev and routing
    block: int  # most that one recomputed block adds
    pool: int = 0  # scores of all steps, where they are one pool

    def of(self, schedule: RolloutSchedule) -> tuple["GraphBytes", ...]:
        """Return what is kept when each graph of a schedule is full; replays stay until the micro-batch is done."""
        beside = schedule.run_twice * self.replay + self.pool
        return tuple(self._graph(part, beside) for part in schedule.passes)

    def _graph(self, part: Pass, beside: int) -> "GraphBytes":
        if part.recompute:
            return GraphBytes(
                self.inputs.at(part.num_trained) + self.block + beside, self.inputs.per_step, part.graph_calls
            )
        graph = self.kept.at(part.num_trained)
        return GraphBytes(graph + beside, graph if part.graph_calls == 1 else self.kept.per_step, part.graph_calls)


class GraphBytes(NamedTuple):
    """Bytes of activations on a rank when a graph is full."""

    most: int
    last_call: int  # what of it is gone when the backward of its last model call is done
    calls: int  # model calls in the graph: how often it uses each parameter


class SampleTokens(NamedTuple):
    """How large the samples of a plan are."""

    image: int  # tokens per image
    text: int  # tokens per caption


class _StorageMeter:
    """Adds up the bytes of unique storages. Holds on to what it has seen, so that no address is seen twice."""

    def __init__(self, without: Iterable[Tensor]) -> None:
        self.total = 0
        self._seen = {_key(tensor): tensor for tensor in without}

    def add(self, values: Any) -> None:
        """Count the tensors of a nested value that have a storage not seen before."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._seen:
                self._seen[_key(tensor)] = tensor
                self.total += tensor.untyped_storage().nbytes()

    @contextmanager
    def on_saved(self) -> Iterator[None]:
        """Inside, count what autograd saves."""

        def keep(tensor: Tensor) -> Tensor:
            self.add(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _EvenDispatcher(LocalDispatcher):
    """Assumes that all experts are here and take as many rows each: the row counts of real routing are data.

    An exchange between ranks keeps nothing but the places of rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def dispatch(self, x: Tensor, assignment: Assignment) -> Dispatched:
        per_expert = max(1, self._rows // assignment.routing_map.shape[1])
        return super().dispatch(x, assignment._replace(counts=RowCounts(per_expert)))


def count_activations(run: RunConfig, micro_batch: int, tokens: SampleTokens) -> Activations:
    """Run the objective on tensors without storage and count. Only the number of an image's tokens matters, not a grid.

    Rows are those that the rule gives to experts; where they vary over a trajectory, those of its fullest step.
    """
    if not pools_trajectories(run):
        return _count_rule(run, micro_batch, tokens)
    step, layer = (_count_rule(_fuller(run, by), micro_batch, tokens) for by in (FULLEST_STEP, FULLEST_LAYER))
    return step._replace(block=layer.block, pool=_pool_bytes(run, micro_batch * tokens.image))


def _fuller(run: RunConfig, by: float) -> RunConfig:
    """Return a run in which experts take `by` times as many tokens, at most all."""
    model = run.model
    capacity, *capacities = (min(by * each, model.num_experts) for each in (model.capacity, *(model.capacities or ())))
    return _with(run, capacity=capacity, capacities=tuple(capacities) if model.capacities else None)


def _pool_bytes(run: RunConfig, call: int) -> int:
    """Bytes of the scores of all steps, of predictions where thresholds are their own, and of the copy that ranks them.

    call: tokens of a call.
    """
    layers, kinds = run.model.num_moe_layers, 3 if run.model.family.thresholds == "predicted" else 2
    return kinds * run.rollout.num_steps * layers * run.model.num_experts * call * _SCORE


def _count_rule(run: RunConfig, micro_batch: int, tokens: SampleTokens) -> Activations:
    """Count with the rows that the rule gives to experts.

    Depth is a pattern of dense and MoE blocks that repeats, and what is kept is linear in it: two shallow models are
    enough. Where capacities differ, what is kept is that of their mean, and the largest decides about one block.
    """
    if run.model.capacities is not None and run.model.moe_blocks:
        even, most = (_with(run, capacities=None, capacity=capacity) for capacity in _mean_and_most(run.model))
        largest = _count_rule(most, micro_batch, tokens).block
        return _count_rule(even, micro_batch, tokens)._replace(block=largest)
    model = run.model
    ends = model.dense_first + model.dense_last
    short = ends + model.moe_every + (model.depth - ends) % model.moe_every
    repeats = max(0, (model.depth - short) // model.moe_every)
    if repeats < 2 or _names_single_blocks(run):
        return _count(run, micro_batch, tokens)
    one, two = (_count(_with(run, depth=depth), micro_batch, tokens) for depth in (short, short + model.moe_every))
    return Activations(
        _extend(one.kept, two.kept, repeats),
        _extend(one.inputs, two.inputs, repeats),
        one.replay + repeats * (two.replay - one.replay),
        max(one.block, two.block),
    )


def _with(run: RunConfig, **fields: Any) -> RunConfig:
    return run.model_copy(update={"model": run.model.model_copy(update=fields)})


def _mean_and_most(model: ModelConfig) -> tuple[float, float]:
    return model.mean_capacity, max(layer.capacity for layer in model.moe_blocks)


def _names_single_blocks(run: RunConfig) -> bool:
    """Whether patterns train blocks of one kind differently, so that depth is no pattern that repeats."""
    patterns = (*run.train.trainable, *run.train.frozen, *run.lora.targets)
    return any(character in "0123456789?[" for pattern in patterns for character in pattern)


def _extend(one: _LinearBytes, two: _LinearBytes, repeats: int) -> _LinearBytes:
    return _LinearBytes(*(first + repeats * (second - first) for first, second in zip(one, two, strict=True)))


def _count(run: RunConfig, micro_batch: int, tokens: SampleTokens) -> Activations:
    model = _skeleton(run, micro_batch, tokens.image)
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = Objective(model.to_empty(device="cpu"), run).train()
        items = {steps: _item(run, micro_batch, steps, tokens) for steps in (1, 2)}
        kept, block = _line([_graph(objective, item, recompute=False) for item in items.values()])
        inputs, _ = _line([_graph(objective, item, recompute=True) for item in items.values()])
        replayed = _replay(objective, items[1])
    return Activations(kept, inputs, replayed, block)


def _line(counted: list[tuple[int, int]]) -> tuple[_LinearBytes, int]:
    """Fit graphs of one and of two steps; the second figure is that of one step."""
    (one, block), (two, _) = counted
    return _LinearBytes(2 * one - two, two - one), block


def _skeleton(run: RunConfig, micro_batch: int, tokens: int) -> Backbone:
    """The model without storage, in the dtypes of training. How experts are spread changes weights, not rows."""
    model = planned_model(run)
    for layer in model.moe_layers():
        layer.dispatcher = _EvenDispatcher(rows_of_call(layer.config, micro_batch, tokens))
    if run.train.precision == "bf16":
        model = model.bfloat16()
    return model


def _item(run: RunConfig, micro_batch: int, steps: int, tokens: SampleTokens) -> TrajectoryBatch:
    model = run.model
    latent = torch.empty(micro_batch, model.latent_channels, model.patch_size, tokens.image * model.patch_size)
    condition: Condition = ClassCondition(torch.empty(micro_batch, dtype=torch.int64))
    if model.conditioning == "text":
        condition = TextCondition(
            torch.empty(micro_batch, tokens.text, model.text_width),
            torch.empty(micro_batch, tokens.text, dtype=torch.bool),
            torch.empty(micro_batch, model.pooled_width),
        )
    times, saliency = torch.empty(steps, micro_batch), torch.empty(micro_batch, tokens.image)
    return TrajectoryBatch(latent, torch.empty_like(latent), times, condition, saliency)


def _graph(objective: Objective, item: TrajectoryBatch, recompute: bool) -> tuple[int, int]:
    """Bytes kept by a call with gradient, and the most that one block of it keeps beside its inputs."""
    meter, blocks = _meter(objective, item), list[int]()
    run = objective.run
    objective.run = with_schedule(run, schedule="checkpoint" if recompute else "plain")

    def before(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        meter.add(inputs)
        blocks.append(meter.total)

    def after(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        blocks.append(meter.total - blocks.pop())

    handles = [block.register_forward_pre_hook(before) for block in objective.model.blocks]
    handles += [block.register_forward_hook(after) for block in objective.model.blocks]
    with meter.on_saved():
        meter.add(objective(StepRequest((item,))))
    for handle in handles:
        handle.remove()
    objective.run = run
    return meter.total, max(blocks)


def _replay(objective: Objective, item: TrajectoryBatch) -> int:
    meter = _meter(objective, item)
    with torch.no_grad():
        x0_prev = first_x0_prev(item, objective.uses_x0_prev)
        meter.add(replay(rollout_step(objective.model, item, 0, x0_prev), x0_prev))
    return meter.total


def _meter(objective: Objective, item: TrajectoryBatch) -> _StorageMeter:
    return _StorageMeter([*objective.parameters(), *objective.buffers(), *(t for t in tree_leaves(item))])
