"""What differs between two weights of one architecture: parts, experts of every layer, and experts that changed places.

Read tensor by tensor: of both weights, one tensor is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sharpmoe.errors import CheckpointError
from sharpmoe.model.weights import OTHER_WEIGHTS, check_finite

_EXPERTS = re.compile(r"(.*\b(\d+)\..*\bexperts\.)\w+")  # a stack of experts, and the number of its block
_UNRELATED = 0.5  # mean cosine of matched experts below which one does not stem from the other
_AT_A_TIME = 2**24  # values in float64 at a time
_SAME = 1e-9  # a gain of the summed cosine that is rounding


class ComparedWeights(Protocol):
    """Weights that are read tensor by tensor, such as `WeightsFile` and `PublishedFolder`."""

    path: Any
    names: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class Change:
    """How values A became values B, as sums over all of them in float64."""

    tensors: int = 0
    values: int = 0
    before: float = 0.0  # |A|^2
    after: float = 0.0  # |B|^2
    moved: float = 0.0  # |B - A|^2
    inner: float = 0.0  # <A, B>

    @classmethod
    def between(cls, a: Tensor, b: Tensor) -> Change:
        """Return the change of one tensor; both have the same shape."""
        sums = [0.0] * 4
        for old, new in zip(a.flatten().split(_AT_A_TIME), b.flatten().split(_AT_A_TIME), strict=True):
            old, new = old.double(), new.double()
            products = (old @ old, new @ new, (new - old) @ (new - old), old @ new)
            sums = [total + float(part) for total, part in zip(sums, products, strict=True)]
        return cls(tensors=1, values=a.numel(), before=sums[0], after=sums[1], moved=sums[2], inner=sums[3])

    def __add__(self, other: Change) -> Change:
        return Change(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)}
        )

    @property
    def relative(self) -> float | None:
        """|B - A| / |A|; None where A is zero and B is not, as of a saliency router that starts at zero."""
        return 0.0 if not self.moved else math.sqrt(self.moved / self.before) if self.before else None

    @property
    def cosine(self) -> float | None:
        """The cosine of A and B; None where one is zero."""
        norm = math.sqrt(self.before * self.after)
        return max(-1.0, min(1.0, self.inner / norm)) if norm else None

    def figures(self) -> dict[str, float | int | None]:
        """Return the figures of the table, for JSON."""
        norms = {"norm_before": math.sqrt(self.before), "norm_after": math.sqrt(self.after)}
        counts = {"tensors": self.tensors, "values": self.values}
        return {**counts, "relative_change": self.relative, "cosine": self.cosine, **norms}


@dataclass(frozen=True, kw_only=True)
class ExpertDrift:
    """One expert of A, and what became of it."""

    expert: int
    matched: int | None  # the expert of B that it is matched with; None where B has fewer experts
    change: Change | None  # to the expert of B in the same place; None where there is none
    matched_change: Change | None


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """The MoE layer of one block."""

    block: int
    experts: tuple[ExpertDrift, ...]
    alike_before: float | None  # mean cosine between different experts of A; None for a single one
    alike_after: float | None
    parts: dict[str, Change]  # of the layer beside its experts: gate, saliency_router, ...
    reordered: dict[str, Change]  # the same with the rows of B in the order of the matched experts; empty: none moved

    @property
    def moves(self) -> tuple[tuple[int, int], ...]:
        """Experts of A whose counterpart in B has another number: (in A, in B)."""
        pairs = ((each.expert, each.matched) for each in self.experts)
        return tuple((i, j) for i, j in pairs if j is not None and j != i)

    @property
    def is_related(self) -> bool:
        """Whether the matched experts resemble each other at all; the matching of others says nothing."""
        cosines = [each.matched_change.cosine or 0.0 for each in self.experts if each.matched_change is not None]
        return sum(cosines) / max(len(cosines), 1) >= _UNRELATED


@dataclass(frozen=True, kw_only=True)
class WeightsDifference:
    """The difference of two weights."""

    equal: int  # tensors that are equal bit for bit
    parts: dict[str, Change]  # tensors of both by part: their names without numbers of blocks
    layers: tuple[LayerDrift, ...]
    new: tuple[str, ...]  # tensors that only B has
    missing: tuple[str, ...]  # tensors that only A has
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # tensors of another shape: in A, in B

    @property
    def whole(self) -> Change:
        """The change of all tensors that both have."""
        return sum(self.parts.values(), Change())


def compare_weights(a: ComparedWeights, b: ComparedWeights) -> WeightsDifference:
    """Compare two weights tensor by tensor.

    Raises CheckpointError where they have no tensor in common, or one holds values that are not finite.
    """
    common = sorted(a.names & b.names, key=_natural)
    if not common:
        raise CheckpointError(f"{b.path}: no tensor has a name of {a.path}: nothing to compare; {OTHER_WEIGHTS}")
    parts: dict[str, Change] = {}
    stacks: dict[str, _ExpertSums] = {}
    changes: dict[str, Change] = {}
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in common:
        old, new = (_sound(weights, name) for weights in (a, b))
        found = _EXPERTS.fullmatch(name)
        if found and old.shape[1:] == new.shape[1:]:
            stacks.setdefault(found[1], _ExpertSums(int(found[2]))).add(old, new)
        if old.shape != new.shape:
            reshaped[name] = (tuple(old.shape), tuple(new.shape))
            continue
        changes[name] = Change.between(old, new)
        part = part_of(name)
        parts[part] = parts.get(part, Change()) + changes[name]
    return WeightsDifference(
        equal=sum(change.moved == 0 for change in changes.values()),
        parts=dict(sorted(parts.items(), key=lambda each: _natural(each[0]))),
        layers=tuple(_layer(prefix, sums, changes, (a, b)) for prefix, sums in stacks.items()),
        new=tuple(sorted(b.names - a.names, key=_natural)),
        missing=tuple(sorted(a.names - b.names, key=_natural)),
        reshaped=reshaped,
    )


class _ExpertSums:
    """Inner products between the experts of a layer, added up over its stacked tensors, in float64."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.within_a = self.within_b = self.across = self.moved = torch.zeros(())

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add one stacked tensor (E, ...) of each; the numbers of experts may differ."""
        same, columns = min(len(a), len(b)), max(1, _AT_A_TIME // max(len(a), len(b)))
        for old, new in zip(a.flatten(1).split(columns, 1), b.flatten(1).split(columns, 1), strict=True):
            old, new = old.double(), new.double()
            self.within_a, self.within_b = self.within_a + old @ old.T, self.within_b + new @ new.T
            self.across = self.across + old @ new.T
            self.moved = self.moved + (old[:same] - new[:same]).square().sum(1)

    def cosines(self) -> Tensor:
        """The cosine of every expert of A with every one of B."""
        norms = self.within_a.diagonal().sqrt()[:, None] * self.within_b.diagonal().sqrt()
        return self.across / norms.clamp(min=1e-300)

    def change(self, i: int, j: int) -> Change:
        """The change from expert i of A to expert j of B."""
        before, after, inner = (float(x) for x in (self.within_a[i, i], self.within_b[j, j], self.across[i, j]))
        moved = float(self.moved[i]) if i == j else max(0.0, before + after - 2 * inner)
        return Change(before=before, after=after, inner=inner, moved=moved)


def _layer(
    prefix: str, sums: _ExpertSums, changes: Mapping[str, Change], weights: tuple[ComparedWeights, ComparedWeights]
) -> LayerDrift:
    matched = _match(sums.cosines())
    size, size_b = sums.across.shape
    experts = tuple(
        ExpertDrift(
            expert=i,
            matched=matched.get(i),
            change=sums.change(i, i) if i < size_b else None,
            matched_change=sums.change(i, matched[i]) if i in matched else None,
        )
        for i in range(size)
    )
    layer = prefix.removesuffix("experts.")
    beside = [name for name in changes if name.startswith(layer) and not name.startswith(prefix)]
    order = [matched.get(i, -1) for i in range(size)] if size == size_b else []
    moved = order != list(range(size)) and bool(order)
    return LayerDrift(
        block=sums.block,
        experts=experts,
        alike_before=_mean_cosine(sums.within_a),
        alike_after=_mean_cosine(sums.within_b),
        parts=_summed(layer, beside, changes),
        reordered=_summed(layer, beside, {name: _reordered(name, order, weights) for name in beside} if moved else {}),
    )


def _match(cosines: Tensor) -> dict[int, int]:
    """Return the pairs with the largest sum of cosines; every expert keeps its place where that is as good."""
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    kept = cosines.diagonal().sum()
    if cosines[rows, columns].sum() <= kept + _SAME:
        return {i: i for i in range(min(cosines.shape))}
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _reordered(name: str, order: Sequence[int], weights: tuple[ComparedWeights, ComparedWeights]) -> Change:
    """Return the change of a tensor whose rows of B, where it has one per expert, are taken in the order of A."""
    old, new = (each.tensor(name) for each in weights)
    rows = order[: len(old)] if old.ndim else []  # an unconditional expert, the last, has no row in the gate
    per_expert = ".hidden." not in name and len(order) - len(rows) <= 1 and len(rows) == len(old) and old.ndim > 0
    return Change.between(old, new[list(rows)] if per_expert and sorted(rows) == list(range(len(old))) else new)


def _summed(layer: str, names: Sequence[str], changes: Mapping[str, Change]) -> dict[str, Change]:
    """Return the changes of a layer's tensors, summed by the module below the layer."""
    sums: dict[str, Change] = {}
    for name in names:
        if name in changes:
            part = name.removeprefix(layer).split(".")[0]
            sums[part] = sums.get(part, Change()) + changes[name]
    return sums


def _mean_cosine(within: Tensor) -> float | None:
    """Return the mean cosine between different experts from their inner products (E, E)."""
    size = len(within)
    if size < 2:
        return None
    norm = within.diagonal().clamp(min=1e-300).sqrt()
    cosines = within / norm[:, None] / norm
    return float((cosines.sum() - cosines.diagonal().sum()) / (size * (size - 1)))


def _sound(weights: ComparedWeights, name: str) -> Tensor:
    value = weights.tensor(name)
    check_finite(name, value, str(weights.path), OTHER_WEIGHTS)
    return value


def part_of(name: str) -> str:
    """Return the part of a tensor: the first two words of its name without numbers, three in MoE layers."""
    words = [word for word in name.split(".") if not word.isdigit()]
    if "moe" in words[:-1]:
        return ".".join(words[:3])
    return ".".join(words[: 2 if len(words) > 2 else 1])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that counts: block 10 follows block 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
