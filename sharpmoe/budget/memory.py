"""Bytes of weights, gradients, optimizer and buffers on one rank, as DeepSpeed 0.19.8 allocates them. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sharpmoe.budget.activations import Kept
from sharpmoe.budget.gathers import Gathers
from sharpmoe.budget.layout import Part
from sharpmoe.budget.schedules import Schedule
from sharpmoe.parallel.zero_settings import ZeroSettings

MASTER = 4  # bytes of a float32 master weight, and of each optimizer state and the EMA
_ALIGN = 2  # ZeRO-2 pads a group to a multiple of this times its ranks


class Memory(NamedTuple):
    """Bytes on one rank."""

    weights: int  # in the dtype of the forward: this rank's part (ZeRO-3) or all
    masters: int  # float32 masters
    gradients: int  # this rank's part, accumulated
    optimizer: int
    ema: int
    gathered: int  # most weights that are whole at one time beside this rank's part (ZeRO-3)
    arriving: int  # a gather that comes beside a full graph, in one piece before it is copied out (ZeRO-3)
    whole_gradients: int  # most gradients that are not reduced yet
    buckets: int  # gradients on their way to the wire, and what is sent
    activations: int
    backward: int  # most of gathered, arriving, whole_gradients, buckets and activations at one time
    update: int  # flat gradients of the optimizer call, when activations and whole gradients are gone
    look: int  # a whole averaged model, and a second set of masters while it is made (log.*); nothing else is then kept
    host: int  # what of the above is in host memory because it is offloaded

    @property
    def state(self) -> int:
        """What lives from step to step."""
        return self.weights + self.masters + self.gradients + self.optimizer + self.ema

    @property
    def peak(self) -> int:
        """Most bytes on the device: in a backward, in the update, or in a look."""
        return self.state - self.host + max(self.backward, self.update, self.look)


class Sizes(NamedTuple):
    """Elements on one rank."""

    whole: int  # all parameters, this rank's experts only
    shard: int  # this rank's part
    largest: int  # of one parameter


def sizes_of(parts: Sequence[Part], zero: ZeroSettings) -> Sizes:
    """Add up parameters with the padding of the stage."""
    largest = max(part.numel for part in parts)
    if zero.stage == 3:
        return Sizes(sum(part.numel for part in parts), sum(part.shard for part in parts), largest)
    groups = groups_of(parts)
    return Sizes(sum(groups.values()), sum(numel // ranks for (_, ranks), numel in groups.items()), largest)


def groups_of(parts: Sequence[Part]) -> dict[tuple[bool, int], int]:
    """ZeRO-2 flattens dense weights and experts apart: (is_expert, ranks) -> elements with padding."""
    groups: dict[tuple[bool, int], int] = {}
    for part in parts:
        key = (part.is_expert, part.ranks)
        groups[key] = groups.get(key, 0) + part.numel
    return {key: math.ceil(numel / (_ALIGN * key[1])) * _ALIGN * key[1] for key, numel in groups.items()}


class Step(NamedTuple):
    """What of a step decides memory beside the parameters."""

    schedule: Schedule
    accumulation: int
    gathers: Gathers
    activations: Kept
    states: int  # optimizer states per weight: 2 for AdamW, 0 for SGD
    look: int  # parameters of the model that a look makes whole; 0 without looks


def memory(parts: Sequence[Part], zero: ZeroSettings, step: Step) -> Memory:
    """All of it; see the fields of `Memory`."""
    size = sizes_of(parts, zero)
    weights = (size.shard if zero.stage == 3 else size.whole) * zero.compute_bytes
    masters = size.shard * MASTER  # a copy even where the weights are float32
    gradients = (size.shard if _is_flat(zero) else _straddled(parts)) * zero.gradient_bytes
    optimizer = size.shard * MASTER * step.states
    gathered, arriving = (count * zero.compute_bytes for count in step.gathers[1:])
    waiting = _whole_gradients(size, zero, step)
    buckets = _buckets(size, zero)
    again = gradients if _adds_up(step) and not _is_flat(zero) else 0  # of this backward, beside the sum so far
    return Memory(
        weights,
        masters,
        gradients,
        optimizer,
        size.shard * MASTER,
        gathered,
        arriving,
        waiting,
        buckets,
        step.activations.most,
        gathered + arriving + buckets + _in_graph(step, waiting, again, size.largest * zero.compute_bytes),
        _update(size, zero),
        (step.look + size.shard) * MASTER if step.look else 0,
        _offloaded(zero, weights, masters + gradients + optimizer),
    )


def _in_graph(step: Step, waiting: int, again: int, largest: int) -> int:
    """Most of activations and gradients at one time.

    With several steps in a call all gradients wait when the last step's graph is gone, and are reduced when only the
    first step's is left. `again`: gradients of this backward beside the sum so far; `largest`: that of one use, on its
    way to those that wait.
    """
    kept, steps = step.activations, _graph_steps(step)
    if steps == 1:
        return kept.most + waiting + again
    return kept.most + largest + max(0, waiting - kept.last_step, waiting + again - (steps - 1) * kept.last_step)


def _graph_steps(step: Step) -> int:
    return max(call.steps for call in step.schedule.calls if call.backward)


def _offloaded(zero: ZeroSettings, weights: int, others: int) -> int:
    return (others if zero.host_optimizer else 0) + (weights if zero.host_weights else 0)


def _is_flat(zero: ZeroSettings) -> bool:
    """Whether gradients are accumulated in one flat part; ZeRO-2 without another dtype for it keeps whole tensors."""
    return zero.stage == 3 or zero.gradient_bytes != zero.compute_bytes


def _straddled(parts: Sequence[Part]) -> int:
    """Elements of all parameters of which a rank has a part, on the rank that has most (ZeRO-2)."""
    most = 0
    for (is_expert, ranks), padded in groups_of(parts).items():
        held, start = [0] * ranks, 0
        for part in (part for part in parts if part.is_expert == is_expert):
            last = (start + part.numel - 1) // (padded // ranks)
            for rank in range(start // (padded // ranks), last + 1):
                held[rank] += part.numel
            start += part.numel
        most += max(held)
    return most


def _whole_gradients(size: Sizes, zero: ZeroSettings, step: Step) -> int:
    """A gradient waits, whole, until all uses of its parameter in a call have added to it.

    With several steps in a call the uses of every parameter end in the backward of the first step, so that all
    gradients wait together; with one step they leave for their bucket one by one.
    """
    return (size.whole if _graph_steps(step) > 1 else size.largest) * zero.compute_bytes


def _adds_up(step: Step) -> bool:
    """Whether more than one backward adds to the gradients of a step."""
    return step.accumulation * step.schedule.backwards > 1


def _buckets(size: Sizes, zero: ZeroSettings) -> int:
    """The contiguous buffers, and the flat copy that goes over the wire: a bucket, or a parameter larger than it."""
    buffers = zero.reduce_bucket * (2 if zero.double_buffer else 1) if zero.contiguous else 0
    element = zero.wire_bytes if zero.stage == 3 else zero.compute_bytes
    sent = min(size.whole, max(zero.reduce_bucket, size.largest))
    return buffers * element + sent * zero.wire_bytes


def _update(size: Sizes, zero: ZeroSettings) -> int:
    """Flat float32 gradients: of a sub-group under ZeRO-3, of the rank's part under ZeRO-2."""
    if zero.host_optimizer:
        return 0
    return min(size.shard, zero.sub_group if zero.stage == 3 else size.shard) * MASTER
