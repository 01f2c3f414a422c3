"""Replay recorded routing on ranks that share the experts: how unevenly it loads them, and what they exchange. Pure.

The planner assumes balanced routing (planning/traffic.py). Here every group of ep_size ranks takes micro_batch images
per rank of the record, in its order, and expert e lies on rank e // (E / ep_size), as in training. A layer waits for
its most loaded rank, so load is given as most / mean rows of a rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.routing_record import RoutingRecord
from sharpmoe.invocation import spell_command

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Rows of the ranks of a group in one MoE layer, over all groups and denoising steps."""

    block: int
    mean: float  # mean of most / mean rows of a rank
    worst: float  # of any group and step
    placed_mean: float  # the same with the experts placed by their load
    placed_worst: float
    placement: tuple[tuple[int, ...], ...]  # experts of each rank


@dataclass(frozen=True, kw_only=True)
class RankLoads:
    """One ep_size."""

    ep_size: int
    micro_batch: int  # images per rank
    groups: int  # groups of ranks that the recorded images fill
    precision: str
    imbalance: float  # sum of the most loaded ranks' rows over sum of the means: time of the experts, 1 is balanced
    placed_imbalance: float
    bytes_mean: float  # that a rank sends per forward of all layers (to experts and back), mean over ranks and steps
    bytes_worst: float  # of any rank of any group and step
    placed_bytes_mean: float
    placed_bytes_worst: float
    layers: tuple[LayerLoad, ...]


def replay_routing(
    record: RoutingRecord, ep_size: int, micro_batch: int, precision: Literal["fp32", "bf16"]
) -> RankLoads:
    """Return the load and the exchanges of the record on groups of `ep_size` ranks.

    Experts are placed by their mean load over the whole record, in each layer, E / ep_size on every rank: the heaviest
    first, each on the least loaded rank that has room. Raises ConfigError where ep_size does not divide the experts,
    or the record has fewer images than one group takes.
    """
    images, experts = record.loads.shape[0], record.loads.shape[-1]
    if experts % ep_size:
        allowed = " | ".join(map(str, [1, *record.ep_sizes]))
        raise ConfigError(f"--ep is {ep_size}, allowed: {allowed} (it must divide {experts} experts)")
    groups = images // (ep_size * micro_batch)
    if not groups:
        raise ConfigError(
            f"--ep {ep_size} x --micro-batch {micro_batch} is {ep_size * micro_batch} images, but the record has "
            f"{images}; record more (`{spell_command('evaluate')} --images`), or lower --micro-batch"
        )
    used = record.loads[: groups * ep_size * micro_batch].double()
    sent = used.unflatten(0, (groups, ep_size, micro_batch)).sum(2).transpose(1, 2)  # (G, T, S, L, E) by sending rank
    width = experts // ep_size
    plain = torch.arange(experts).expand(len(record.blocks), -1)
    placed = torch.stack([_placed(record.loads[:, :, k].double().mean((0, 1)), ep_size) for k in range(len(plain))])
    (rows, traffic), (placed_rows, placed_traffic) = (_on_ranks(sent, order, ep_size) for order in (plain, placed))
    ratios, placed_ratios = (each.amax(-1) / each.mean(-1).clamp(min=1e-12) for each in (rows, placed_rows))
    per_row = record.width * _BYTES[precision]
    return RankLoads(
        ep_size=ep_size,
        micro_batch=micro_batch,
        groups=groups,
        precision=precision,
        imbalance=_imbalance(rows),
        placed_imbalance=_imbalance(placed_rows),
        bytes_mean=float(traffic.mean()) * per_row,
        bytes_worst=float(traffic.max()) * per_row,
        placed_bytes_mean=float(placed_traffic.mean()) * per_row,
        placed_bytes_worst=float(placed_traffic.max()) * per_row,
        layers=tuple(
            LayerLoad(
                block=block,
                mean=float(ratios[:, :, k].mean()),
                worst=float(ratios[:, :, k].max()),
                placed_mean=float(placed_ratios[:, :, k].mean()),
                placed_worst=float(placed_ratios[:, :, k].max()),
                placement=tuple(tuple(sorted(run)) for run in placed[k].view(ep_size, width).tolist()),
            )
            for k, block in enumerate(record.blocks)
        ),
    )


def _placed(load: Tensor, ep_size: int) -> Tensor:
    """Return the experts (E,) in the order of ranks, E / ep_size each, by their load (E,)."""
    room, ranks, sums = len(load) // ep_size, [[] for _ in range(ep_size)], [0.0] * ep_size  # type: ignore[var-annotated]
    for expert in sorted(range(len(load)), key=lambda e: (-float(load[e]), e)):
        rank = min((r for r in range(ep_size) if len(ranks[r]) < room), key=lambda r: (sums[r], r))
        ranks[rank].append(expert)
        sums[rank] += float(load[expert])
    return torch.tensor([expert for rank in ranks for expert in rank])


def _on_ranks(sent: Tensor, order: Tensor, ep_size: int) -> tuple[Tensor, Tensor]:
    """Return rows of every rank (G, T, L, R), and rows that every rank sends in a forward of all layers (G, T, R).

    sent (G, T, S, L, E): rows of every sending rank by expert; order (L, E): experts of the first rank, then the next.
    A rank sends its rows to the experts of other ranks, and the outputs of the rows of others back.
    """
    by_place = sent.gather(-1, order.expand(*sent.shape[:3], -1, -1))
    between = by_place.unflatten(-1, (ep_size, -1)).sum(-1)  # (G, T, S, L, R)
    rows = between.sum(2)
    own = between.diagonal(dim1=2, dim2=4)  # (G, T, L, R): rows that stay
    out = between.sum(4).transpose(2, 3)  # (G, T, L, S)
    return rows, ((out - own) + (rows - own)).sum(2)


def _imbalance(rows: Tensor) -> float:
    return float(rows.amax(-1).sum() / rows.mean(-1).sum().clamp(min=1e-12))


def replay_text(record: RoutingRecord, found: list[RankLoads]) -> str:
    """Return a table with a row per ep_size; of a single one also a row per layer, with the placement of experts."""
    lines = [
        f"recorded  {record.model}: {record.router}, {record.title}",
        f"replayed  {found[0].micro_batch} image(s) per rank, {found[0].precision}, in inference; load: most / mean "
        "rows of a rank, 1 is balanced",
        "",
        f"{'ep':>4} {'groups':>7} {'load':>7} {'placed':>7} {'worst':>7} {'placed':>7} "
        f"{'MB sent, mean':>14} {'most':>8} {'placed, mean':>13} {'most':>8}",
    ]
    for each in found:
        worst, placed = (max(values) for values in zip(*((x.worst, x.placed_worst) for x in each.layers), strict=True))
        loads = f"{each.imbalance:>7.3f} {each.placed_imbalance:>7.3f} {worst:>7.3f} {placed:>7.3f}"
        sent = f"{each.bytes_mean / 1e6:>14.3f} {each.bytes_worst / 1e6:>8.3f}"
        placed_sent = f"{each.placed_bytes_mean / 1e6:>13.3f} {each.placed_bytes_worst / 1e6:>8.3f}"
        lines.append(f"{each.ep_size:>4} {each.groups:>7} {loads} {sent} {placed_sent}")
    lines += ["", "MB: sent by a rank in one forward of all layers, to experts of other ranks and back."]
    if len(found) == 1:
        lines += [
            "",
            f"{'MoE layer':<10} {'mean':>7} {'worst':>7} {'placed':>7} {'worst':>7}  experts of each rank, placed",
        ]
        for layer in found[0].layers:
            loads = f"{layer.mean:>7.3f} {layer.worst:>7.3f} {layer.placed_mean:>7.3f} {layer.placed_worst:>7.3f}"
            ranks = " | ".join(" ".join(map(str, run)) for run in layer.placement)
            lines.append(f"{f'block {layer.block}':<10} {loads}  {ranks}")
    return "\n".join(lines)


def replay_json(record: RoutingRecord, found: list[RankLoads]) -> dict[str, object]:
    """Return the same as plain numbers."""
    head = {"model": record.model, "router": record.router, "images": len(record.loads), "times": list(record.times)}
    return {**head, "replays": [asdict(each) for each in found]}
