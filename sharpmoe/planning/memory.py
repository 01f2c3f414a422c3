"""Bytes of weights, gradients, optimizer and buffers on one rank, as DeepSpeed 0.19.8 allocates them. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sharpmoe.parallel.zero.muon import BATCH
from sharpmoe.parallel.zero.settings import ZeroSettings
from sharpmoe.planning.activations import GraphBytes
from sharpmoe.planning.gathers import Gathers
from sharpmoe.planning.layout import RankParameter, trained_parts

MASTER_BYTES = 4  # bytes of a float32 master weight, and of the EMA
_SUM = 4  # bytes of a gradient that is added up within a step (train/local_gradients.py)
_ITERATES = 4  # tensors of Muon's iteration: the matrices, two products of at most their size, the next matrices
_EXCHANGED = 4  # what a rank sends of matrices that it holds a part of, and receives, on both ways
_ALIGN = 2  # ZeRO-2 pads a group to a multiple of this times its ranks


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank."""

    weights: int  # in the dtype of the forward: this rank's part (ZeRO-3) or all
    masters: int  # float32 masters
    gradients: int  # this rank's part, accumulated
    optimizer: int
    ema: int
    gathered: int  # most weights that are whole at one time beside this rank's part (ZeRO-3)
    arriving: int  # a gather that comes beside a full graph, in one piece before it is copied out (ZeRO-3)
    sums: int  # gradients of all backwards of a step but the last, whole, added up on this rank
    whole_gradients: int  # most gradients of one backward that wait, for the last use of their parameter or to be added
    buckets: int  # gradients on their way to the wire, and what is sent
    activations: int
    backward: int  # what a backward adds to the state at the most: all of these, as far as they are there together
    update: int  # flat gradients of the optimizer call, when activations and whole gradients are gone
    look: int  # of the monitor: a whole averaged model; nothing else is held then
    judge: int  # the network that judges samples (log.metrics_every)
    host: int  # what of the above is in host memory because it is offloaded

    @property
    def state(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.training + self.judge

    @property
    def training(self) -> int:
        """Bytes that stay because parameters are trained: masters, gradients, optimizer states, average."""
        return self.masters + self.gradients + self.optimizer + self.ema

    @property
    def peak(self) -> int:
        """Most bytes on the device: in a backward, in the update, or in the monitor."""
        return self.state - self.host + max(self.backward, self.update, self.look)


class _Sizes(NamedTuple):
    """Elements on one rank. Those of frozen parameters are weights and nothing else."""

    weights: int  # in the dtype of the forward: this rank's part (ZeRO-3) or all
    whole: int  # all parameters that are trained, this rank's experts only
    shard: int  # this rank's part of them
    largest: int  # of one of them


def _sizes(parts: Sequence[RankParameter], zero: ZeroSettings) -> _Sizes:
    """Add up parameters with the padding of the stage."""
    trained = trained_parts(parts)
    largest = max(part.numel for part in trained)
    if zero.stage == 3:
        shard = sum(part.shard for part in trained)
        return _Sizes(sum(part.shard for part in parts), sum(part.numel for part in trained), shard, largest)
    groups = groups_of(trained)
    whole = sum(groups.values())
    frozen = sum(part.numel for part in parts if not part.is_trained)
    shard = sum(numel // ranks for (_, ranks), numel in groups.items())
    return _Sizes(whole + frozen, whole, shard, largest)


def groups_of(parts: Sequence[RankParameter]) -> dict[tuple[bool, int], int]:
    """ZeRO-2 flattens dense weights and experts apart: (is_expert, ranks) -> elements with padding."""
    groups: dict[tuple[bool, int], int] = {}
    for part in parts:
        key = (part.is_expert, part.ranks)
        groups[key] = groups.get(key, 0) + part.numel
    return {key: math.ceil(numel / (_ALIGN * key[1])) * _ALIGN * key[1] for key, numel in groups.items()}


class StepNeeds(NamedTuple):
    """What determines the memory of a step beside the parameters."""

    graphs: tuple[GraphBytes, ...]  # of one micro-batch, in the order of their backwards
    accumulation: int
    gathers: Gathers
    monitored: int  # bytes of the model that the monitor makes whole; 0 where it does nothing
    judge: int = 0  # bytes of the network that judges samples

    @property
    def backwards(self) -> int:
        """Backwards of an optimizer step. The last is the engine's."""
        return len(self.graphs) * self.accumulation


def rank_memory(parts: Sequence[RankParameter], zero: ZeroSettings, step: StepNeeds) -> Memory:
    """Add up the bytes of weights, gradients, optimizer, buffers and activations on one rank."""
    size, trained = _sizes(parts, zero), trained_parts(parts)
    weights = size.weights * zero.compute_bytes
    masters = size.shard * MASTER_BYTES  # a copy even where the weights are float32
    gradients = (size.shard if _is_flat(zero) else _straddled(trained)) * zero.gradient_bytes
    held = sum(part.shard for part in trained)
    optimizer = size.shard * sum(part.shard * part.state_bytes for part in trained) // held
    gathered, arriving = step.gathers.peak * zero.compute_bytes, step.gathers.arriving * zero.compute_bytes
    waiting = _WaitingGradients(sum(part.numel for part in trained), size.largest, zero.compute_bytes)
    buckets = _buckets(size, zero)
    backward = gathered + arriving + buckets + waiting.with_graphs(step)
    if zero.stage == 2 and not zero.host_optimizer:
        # A rank's part, which the state counts, is made as gradients are reduced.
        backward = max(backward - gradients, buckets + waiting.of(step))
    return Memory(
        weights=weights,
        masters=masters,
        gradients=gradients,
        optimizer=optimizer,
        ema=size.shard * MASTER_BYTES,
        gathered=gathered,
        arriving=arriving,
        sums=waiting.sums if step.backwards > 1 else 0,
        whole_gradients=waiting.of(step),
        buckets=buckets,
        activations=max(graph.most for graph in step.graphs),
        backward=backward,
        update=_update(size, zero) + _orthogonalised(trained, zero),
        look=step.monitored,
        judge=step.judge,
        host=_offloaded(zero, weights, masters + gradients + optimizer + size.shard * MASTER_BYTES),
    )


class _WaitingGradients(NamedTuple):
    """Gradients that are not reduced yet, and the graphs beside them."""

    elements: int  # of the parameters as this rank computes with them
    largest: int
    width: int  # bytes of a gradient's element

    @property
    def whole(self) -> int:
        """Bytes of all gradients of one backward."""
        return self.elements * self.width

    @property
    def sums(self) -> int:
        """Bytes of all gradients added up: float32 or better."""
        return self.elements * max(_SUM, self.width)

    @property
    def one(self) -> int:
        """Bytes of the largest, on its way to those that wait."""
        return self.largest * self.width

    def of(self, step: StepNeeds) -> int:
        """Bytes that wait of one backward: all where a graph uses each parameter several times, else one by one."""
        several = any(graph.calls > 1 for graph in step.graphs)
        return self.whole if several or step.backwards > 1 else self.one

    def with_graphs(self, step: StepNeeds) -> int:
        """Most bytes of gradients and activations at one time in a step."""
        last = self._reduced(step.graphs[-1], step.backwards > 1)
        rounds = [step.graphs] * min(step.accumulation, 2)  # later micro-batches are like the second
        inner = [graph for graphs in rounds for graph in graphs]
        if step.accumulation <= 2:
            del inner[-1]
        return max([last, *(self._added_up(graph, number > 0) for number, graph in enumerate(inner))])

    def _reduced(self, graph: GraphBytes, after_others: bool) -> int:
        """In the engine's backward. Sums wait there, rounded, until the last use of their parameter has added to them.

        Without sums, and with several model calls in a graph, all gradients wait when the last call's part is gone, and
        are reduced when only the first call's is left.
        """
        if after_others:
            return graph.most + self.sums + self.one
        return graph.most + self.one + (max(0, self.whole - graph.last_call) if graph.calls > 1 else 0)

    def _added_up(self, graph: GraphBytes, is_there: bool) -> int:
        """In a backward of our own: a gradient is added to its sum after the last use of its parameter.

        With several model calls in a graph all gradients wait when the last call's part is gone.
        """
        wait = max(0, self.whole - graph.last_call) if graph.calls > 1 else 0
        grow = 0 if is_there else max(0, self.sums - graph.most)
        return graph.most + self.one + wait + grow + is_there * self.sums


def _offloaded(zero: ZeroSettings, weights: int, others: int) -> int:
    return (others if zero.host_optimizer else 0) + (weights if zero.host_weights else 0)


def _is_flat(zero: ZeroSettings) -> bool:
    """Whether gradients are accumulated in one flat part; ZeRO-2 without another dtype for it keeps whole tensors."""
    return zero.stage == 3 or zero.gradient_bytes != zero.compute_bytes


def _straddled(parts: Sequence[RankParameter]) -> int:
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


def _buckets(size: _Sizes, zero: ZeroSettings) -> int:
    """The contiguous buffers, and the flat copy that goes over the wire: a bucket, or a parameter larger than it."""
    buffers = zero.reduce_bucket * (2 if zero.double_buffer else 1) if zero.contiguous else 0
    element = zero.wire_bytes if zero.stage == 3 else zero.compute_bytes
    sent = min(size.whole, max(zero.reduce_bucket, size.largest))
    copied = (
        size.largest * zero.compute_bytes if zero.stage == 2 and zero.host_optimizer else 0
    )  # on its way to the host
    return buffers * element + sent * zero.wire_bytes + copied


def _update(size: _Sizes, zero: ZeroSettings) -> int:
    """Flat float32 gradients: of a sub-group under ZeRO-3, of the rank's part under ZeRO-2."""
    if zero.host_optimizer:
        return 0
    return min(size.shard, zero.sub_group if zero.stage == 3 else size.shard) * MASTER_BYTES


def _orthogonalised(parts: Sequence[RankParameter], zero: ZeroSettings) -> int:
    """Matrices that Muon orthogonalises at a time, with the products of an iteration, and what ranks exchange."""
    matrices = [part for part in parts if part.matrix]
    if not matrices:
        return 0
    held = sum(part.shard for part in matrices)
    batch = max(min(BATCH, held), *(part.matrix for part in matrices), 0)
    exchanged = min(held, zero.sub_group) if zero.stage == 3 else max(part.matrix for part in matrices)
    alone = all(part.ranks == 1 for part in matrices)
    return zero.compute_bytes * (_ITERATES * batch + (0 if alone else _EXCHANGED * exchanged))
