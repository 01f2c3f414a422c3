"""Muon (arXiv 2502.16982) on the flat partitions of ZeRO-2 and ZeRO-3, with AdamW for everything else.

Momentum is kept and checkpointed on the partitions, element by element, like the moments of AdamW. The update of a
matrix is its momentum, orthogonalised, which needs the whole matrix: one rank that holds elements of it receives the
others, orthogonalises, and sends their update back. Each matrix is orthogonalised once in the world. Clipping and the
norm that is logged are those of the gradient, as with any optimizer; DeepSpeed's own Muon clips the orthogonalised
update, together with the gradients that AdamW gets. torch.optim.Muon takes whole two-dimensional parameters only.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sharpmoe.config import OptimConfig
from sharpmoe.model.matrices import MatrixShape
from sharpmoe.parallel.ranks.launch import World, gather_objects
from sharpmoe.parallel.zero.partitions import Piece

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration, as in torch.optim.Muon
_ITERATIONS = 5
_SMALLEST = 1e-7  # norm of a matrix below which it is not scaled to one
_RMS = 0.2  # root mean square of an update's elements, near that of AdamW's
BATCH = 1 << 24  # elements that are orthogonalised at a time, if a matrix has no more


def _orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices (n, rows, columns) with all singular values near one, by five Newton-Schulz iterations.

    In the dtype of the matrices. No communication.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norms.clamp(min=_SMALLEST).to(x.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for the parameter groups that have "muon", torch's fused AdamW for the others.

    Muon's step communicates: all ranks of a partition's process group take it. It changes the gradients.
    """

    def __init__(self, params: Any, optim: OptimConfig) -> None:
        super().__init__(params, optim.lr, optim.betas, optim.eps, weight_decay=optim.weight_decay, fused=True)
        self._momentum = optim.momentum
        self._whole: _WholeMatrices | None = None
        self._parts: dict[Tensor, int] = {}

    def find_matrices(
        self,
        masters: Sequence[Tensor],
        pieces: Sequence[Piece],
        matrices: Mapping[str, MatrixShape],
        groups: Mapping[str, ProcessGroup | None],
        dtype: torch.dtype,
        world: World,
    ) -> None:
        """Tell where the matrices are: before the first step. Communicates: one all-gather of places.

        pieces: of this rank's masters. groups: of each parameter, the ranks among which it is partitioned; None: all.
        dtype: of the iteration and on the wire.
        """
        self._whole = _WholeMatrices(pieces, matrices, groups, dtype, world)
        self._parts = {master: index for index, master in enumerate(masters)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            if any(group["params"] for group in self.param_groups):
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for master in group["params"] if group.get("muon") else ():
                self._update(master, group)

    def _update(self, master: Tensor, group: Mapping[str, Any]) -> None:
        assert self._whole is not None
        gradient, scale = master.grad, getattr(self, "grad_scale", None)
        assert gradient is not None
        if scale is not None:
            gradient.div_(scale)
        state, lr = self.state[master], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(master)
        state["momentum_buffer"].lerp_(gradient, 1 - self._momentum)
        if lr == 0:  # the same on all ranks
            return
        gradient.lerp_(state["momentum_buffer"], self._momentum)  # Nesterov's
        master.mul_(1 - lr * group["weight_decay"])
        self._whole.add_updates(self._parts[master], master, gradient, lr)


class _Move(NamedTuple):
    """Consecutive elements of a stack of matrices, and where they are in a flat tensor."""

    first: int
    start: int
    numel: int


class _Job(NamedTuple):
    """Matrices that this rank orthogonalises: several of which it holds all, or one of which others hold elements."""

    matrices: int
    own: tuple[_Move, ...]  # in its flat partition
    foreign: tuple[_Move, ...]  # in what it receives


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What this rank does with the matrices of one flat partition."""

    group: ProcessGroup | None  # ranks that exchange elements; None: all
    exchanges: bool  # whether any of them does
    batches: Sequence[tuple[MatrixShape, Sequence[_Job]]]  # what is orthogonalised at a time
    sent: Sequence[tuple[_Move, MatrixShape]]  # elements of this rank that others need, in the order of their ranks
    sent_sizes: list[int]  # elements for each rank of the group
    received_sizes: list[int]


class _Fragment(NamedTuple):
    """Elements of one matrix that a rank holds: one run of them, as no partition has a parameter in two places."""

    name: str  # of the parameter
    matrix: int  # index of the matrix in it
    first: int  # index of the first element in the matrix
    numel: int
    start: int  # index of the first element in the flat partition
    part: int  # index of that partition, the same on all ranks
    rank: int

    @property
    def key(self) -> tuple[str, int]:
        """The matrix."""
        return self.name, self.matrix


class _WholeMatrices:
    """Where the matrices of all flat partitions are, and who orthogonalises which."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        matrices: Mapping[str, MatrixShape],
        groups: Mapping[str, ProcessGroup | None],
        dtype: torch.dtype,
        world: World,
    ) -> None:
        """Communicates."""
        self._dtype, self._device = dtype, world.device
        own = [fragment for piece in pieces for fragment in _fragments(piece, matrices, world.rank)]
        everyone = sorted(itertools.chain.from_iterable(gather_objects(own, world)))
        doers = _doers(everyone)
        by_part: dict[int, list[_Fragment]] = {}
        for fragment in everyone:
            by_part.setdefault(fragment.part, []).append(fragment)
        self._plans = {
            part: _plan(found, matrices, doers, groups[found[0].name], world) for part, found in by_part.items()
        }

    def add_updates(self, part: int, master: Tensor, momentum: Tensor, lr: float) -> None:
        """Add the update of all matrices of a partition to its master, in place. Communicates on its group."""
        plan = self._plans[part]
        taken = [momentum.narrow(0, move.start, move.numel) for move, _ in plan.sent]
        inbox = self._exchange(plan, taken, plan.sent_sizes, plan.received_sizes)
        outbox = torch.empty_like(inbox)
        for shape, jobs in plan.batches:
            places = [*itertools.accumulate((job.matrices * shape.numel for job in jobs), initial=0)]
            stack = torch.empty(places[-1], dtype=self._dtype, device=self._device)
            for job, place in zip(jobs, places, strict=False):
                for move, source in _moves(job, momentum, inbox):
                    stack.narrow(0, place + move.first, move.numel).copy_(source)
            stack = _orthogonalise(stack.view(-1, *shape)).reshape(-1)
            for job, place in zip(jobs, places, strict=False):
                for move in job.own:
                    _add(master, move, stack.narrow(0, place + move.first, move.numel), shape, lr)
                for move in job.foreign:
                    outbox.narrow(0, move.start, move.numel).copy_(stack.narrow(0, place + move.first, move.numel))
        back = self._exchange(plan, [outbox], plan.received_sizes, plan.sent_sizes)
        parts = back.split([move.numel for move, _ in plan.sent])
        for (move, shape), values in zip(plan.sent, parts, strict=True):
            _add(master, move, values, shape, lr)

    def _exchange(self, plan: _Plan, parts: Sequence[Tensor], sent: list[int], received: list[int]) -> Tensor:
        """All-to-all of flat tensors, joined, in the dtype of the iteration."""
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        joined = torch.cat([empty, *(part.to(empty) for part in parts)])
        if not plan.exchanges:
            return joined
        out = joined.new_empty(sum(received))
        dist.all_to_all_single(out, joined, received, sent, group=plan.group)
        return out


def _fragments(piece: Piece, matrices: Mapping[str, MatrixShape], rank: int) -> Iterator[_Fragment]:
    """Cut a piece of a parameter at the borders of its matrices; nothing where it has none."""
    if piece.name not in matrices:
        return
    size, end = matrices[piece.name].numel, piece.place + piece.numel
    place = piece.place
    while place < end:
        matrix, first = divmod(place, size)
        numel = min(size - first, end - place)
        yield _Fragment(
            name=piece.name,
            matrix=matrix,
            first=first,
            numel=numel,
            start=piece.start + place - piece.place,
            part=piece.part,
            rank=rank,
        )
        place += numel


def _doers(everyone: Iterable[_Fragment]) -> dict[tuple[str, int], int]:
    """Choose the rank that orthogonalises each matrix, alike on all ranks: of those that hold most of it the idlest."""
    work: dict[int, int] = {}
    chosen = {}
    for key, found in itertools.groupby(everyone, key=lambda fragment: fragment.key):
        holders = [*found]
        most = max(holder.numel for holder in holders)
        doer = min((h.rank for h in holders if h.numel == most), key=lambda rank: (work.get(rank, 0), rank))
        work[doer] = work.get(doer, 0) + sum(holder.numel for holder in holders)
        chosen[key] = doer
    return chosen


def _plan(
    everyone: Sequence[_Fragment],
    matrices: Mapping[str, MatrixShape],
    doers: Mapping[tuple[str, int], int],
    group: ProcessGroup | None,
    world: World,
) -> _Plan:
    """Plan one flat partition. everyone: its fragments on all ranks, sorted by matrix."""
    ranks = [*range(world.size)] if group is None else dist.get_process_group_ranks(group)
    sent: list[_Fragment] = []
    received: list[_Fragment] = []
    exchanges = False
    held: list[list[_Fragment]] = []  # of every matrix that this rank orthogonalises, all fragments
    for key, found in itertools.groupby((f for f in everyone if f.rank in ranks), key=lambda fragment: fragment.key):
        holders = [*found]
        exchanges = exchanges or len(holders) > 1
        if doers[key] == world.rank:
            held.append(holders)
            received += [holder for holder in holders if holder.rank != world.rank]
        else:
            sent += [holder for holder in holders if holder.rank == world.rank]
    sent.sort(key=lambda fragment: (ranks.index(doers[fragment.key]), fragment.key))
    received.sort(key=lambda fragment: (ranks.index(fragment.rank), fragment.key))
    places = dict(zip(received, itertools.accumulate((f.numel for f in received), initial=0), strict=False))
    return _Plan(
        group=group,
        exchanges=exchanges,
        batches=_batches(held, matrices, places, world.rank),
        sent=[(_Move(f.first, f.start, f.numel), matrices[f.name]) for f in sent],
        sent_sizes=[sum(f.numel for f in sent if doers[f.key] == rank) for rank in ranks],
        received_sizes=[sum(f.numel for f in received if f.rank == rank) for rank in ranks],
    )


def _batches(
    held: Sequence[Sequence[_Fragment]],
    matrices: Mapping[str, MatrixShape],
    places: Mapping[_Fragment, int],
    rank: int,
) -> list[tuple[MatrixShape, list[_Job]]]:
    """Divide matrices into batches of one shape; those that lie one after another in the partition are one job."""
    batches: dict[MatrixShape, list[list[_Job]]] = {}
    for holders in sorted(held, key=lambda holders: min(h.start for h in holders if h.rank == rank)):
        shape = matrices[holders[0].name]
        own = tuple(_Move(h.first, h.start, h.numel) for h in holders if h.rank == rank)
        foreign = tuple(_Move(h.first, places[h], h.numel) for h in holders if h.rank != rank)
        of_shape = batches.setdefault(shape, [[]])
        if of_shape[-1] and (sum(job.matrices for job in of_shape[-1]) + 1) * shape.numel > BATCH:
            of_shape.append([])
        jobs = of_shape[-1]
        before = jobs[-1] if jobs and not jobs[-1].foreign and not foreign else None
        if before is not None and before.own[0].start + before.own[0].numel == own[0].start:
            (run,) = before.own
            jobs[-1] = _Job(before.matrices + 1, (run._replace(numel=run.numel + shape.numel),), ())
        else:
            jobs.append(_Job(1, own, foreign))
    return [(shape, jobs) for shape, of_shape in batches.items() for jobs in of_shape]


def _moves(job: _Job, own: Tensor, inbox: Tensor) -> Iterator[tuple[_Move, Tensor]]:
    """Yield each run of elements of a job with its values."""
    for moves, flat in ((job.own, own), (job.foreign, inbox)):
        for move in moves:
            yield move, flat.narrow(0, move.start, move.numel)


def _add(master: Tensor, move: _Move, values: Tensor, shape: MatrixShape, lr: float) -> None:
    """Add orthogonalised values to a master, scaled so that a learning rate means the same as with AdamW."""
    master.narrow(0, move.start, move.numel).add_(values.to(master.device), alpha=-lr * _RMS * math.sqrt(max(shape)))
