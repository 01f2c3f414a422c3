"""The logged figures of a run, as pure functions of records.

`routing_sums` are added over micro-batches and ranks before `routing_scalars` names them; `runlog`
writes them.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.devices import default_device
from sharpmoe.flow import TIME_RANGES
from sharpmoe.moe.influence import INFLUENCE_COLUMNS, choice_of_gate, influence, influence_figures, strength_of
from sharpmoe.moe.routing import Routing
from sharpmoe.train.flops import StepFlops

_LAYER_SUMS = 4  # tokens, entropy, choices, flipped choices
_SUMS = _LAYER_SUMS + len(TIME_RANGES) * INFLUENCE_COLUMNS  # then the influence by range of t; then a column per expert


class Effort(NamedTuple):
    """FLOPs of a step, and the devices that computed them."""

    flops: StepFlops
    ranks: int
    peak_tflops: float | None = None  # of one device; None where it is not known


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One optimizer step as it is logged; all figures are averages or sums over ranks."""

    step: int  # counted from 1
    losses: Mapping[str, float]  # name -> value, logged as loss/<name>
    grad_norm: float  # before clipping
    lr: float
    lr_scale: Mapping[str, float] = field(default_factory=dict)  # pattern of parameter names -> factor on `lr`
    images: int  # trajectories of this step, all ranks
    tokens: int  # image tokens that the model computed in this step: images * T * N, all ranks
    seconds: float  # wall time of the step
    wait_seconds: float  # part of it spent waiting for data
    effort: Effort | None = None

    @property
    def memory_mib(self) -> float:
        """Peak memory of this process in MiB, now: see `_memory_mib`."""
        return _memory_mib()

    @property
    def tflops(self) -> float | None:
        """Model TFLOP/s of one rank: without what was computed twice."""
        return None if self.effort is None else self._tflops(self.effort, self.effort.flops.model)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation: `tflops` over the device's peak."""
        return None if self.effort is None else self._share(self.effort, self.effort.flops.model)

    @property
    def hfu(self) -> float | None:
        """Hardware FLOP utilisation: with what was computed twice."""
        return None if self.effort is None else self._share(self.effort, sum(self.effort.flops))

    def scalars(self) -> dict[str, float]:
        """Name the figures of a step: loss/*, optim/*, throughput/*, memory/*, flops/*."""
        seconds = max(self.seconds, 1e-9)
        return {
            **{f"loss/{name}": value for name, value in self.losses.items()},
            "optim/grad_norm": self.grad_norm,
            "optim/lr": self.lr,
            **{f"optim/lr/{pattern}": self.lr * factor for pattern, factor in self.lr_scale.items()},
            "throughput/images_per_second": self.images / seconds,
            "throughput/tokens_per_second": self.tokens / seconds,
            "throughput/seconds_per_step": self.seconds,
            "throughput/data_wait_share": self.wait_seconds / seconds,
            "memory/peak_mib": self.memory_mib,
            **self._effort_scalars(),
        }

    def _effort_scalars(self) -> dict[str, float]:
        if self.effort is None:
            return {}
        spent = {f"flops/per_image/{part}": float(value) for part, value in self.effort.flops._asdict().items()}
        speeds = {"tflops_per_rank": self.tflops, "mfu": self.mfu, "hfu": self.hfu}
        return spent | {f"throughput/{name}": value for name, value in speeds.items() if value is not None}

    def _tflops(self, effort: Effort, per_image: float) -> float:
        return per_image * self.images / max(self.seconds, 1e-9) / effort.ranks / 1e12

    def _share(self, effort: Effort, per_image: float) -> float | None:
        return None if effort.peak_tflops is None else self._tflops(effort, per_image) / effort.peak_tflops


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step` (from 1); step 1 counts."""
    return every > 0 and (step == 1 or step % every == 0)


def routing_sums(
    routing: Sequence[Sequence[Routing]],
    config: ModelConfig,
    times: Tensor,
    saliency: Tensor,
    *,
    by_cutoff: bool = False,
) -> Tensor:
    """Return the sums of the routing of T training steps x MoE layers: (layers, columns) float64, to add over ranks.

    times (T, B) and saliency (B, N), the maps M, of the same images. Columns: tokens, entropy of the scores in nats,
    choices, choices that the saliency router flipped (the same rule, applied to the call by the gate's logits alone,
    would not make them); `influence` of each range of t; then tokens of each expert. Without gradient. by_cutoff:
    experts took what reached the cutoffs of the records.
    """
    with torch.no_grad():
        steps = [
            torch.stack(
                [_layer_sums(*layer, t, saliency, by_cutoff) for layer in zip(step, config.moe_blocks, strict=True)]
            )
            for step, t in zip(routing, times, strict=True)
            if step
        ]
        return torch.stack(steps).sum(0) if steps else torch.zeros(0, _SUMS + config.total_experts, dtype=torch.float64)


def _layer_sums(record: Routing, config: ModelConfig, t: Tensor, saliency: Tensor, by_cutoff: bool) -> Tensor:
    chosen = record.routing_map
    by_gate = choice_of_gate(record, config, training=True, by_cutoff=by_cutoff)
    shares = record.logits.softmax(-1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    flipped = (chosen[..., : config.num_experts] & ~by_gate).sum()
    tokens = entropy.new_full((), chosen[..., 0].numel(), dtype=torch.float64)  # filled there: no copy from the host
    head = torch.stack([tokens, entropy.double(), chosen.sum().double(), flipped.double()])
    inside = torch.stack([(lower < t) & (t <= upper) for lower, upper in TIME_RANGES.values()]).double()  # (ranges, B)
    by_range = (inside.unsqueeze(-1) * influence(record, by_gate, saliency)).sum(1).flatten()
    return torch.cat([head, by_range, chosen.flatten(0, 1).sum(0).double()])


def routing_scalars(sums: Tensor) -> dict[str, float]:
    """Name the figures of every MoE layer from summed `routing_sums` (layers, columns).

    load_min and load_max: tokens of the least and most loaded expert over the mean load; dead_experts: experts without
    a token; entropy: of the scores, as a share of its maximum log E; flipped: share of choices; and by range of t those
    of `influence_figures`, saliency_<figure>_<range>/layer<n>.
    """
    named: dict[str, float] = {}
    for layer, row in enumerate(sums.cpu().double()):
        tokens, entropy, choices, flipped = row[:_LAYER_SUMS].tolist()
        load = row[_SUMS:]
        ideal = max(choices / len(load), 1e-12)
        figures = {
            "load_min": load.min().item() / ideal,
            "load_max": load.max().item() / ideal,
            "dead_experts": float((load == 0).sum()),
            "entropy": entropy / max(tokens, 1.0) / max(float(np.log(len(load))), 1e-12),
            "flipped": flipped / max(choices, 1.0),
        }
        named |= {f"routing_{name}/layer{layer}": value for name, value in figures.items()}
        for name, part in zip(TIME_RANGES, row[_LAYER_SUMS:_SUMS].view(len(TIME_RANGES), -1).tolist(), strict=True):
            by_range = influence_figures(part).items()
            named |= {f"saliency_{what}_{name.replace(' ', '')}/layer{layer}": value for what, value in by_range}
    return named


def strength_warning(sums: Tensor, step: int) -> str:
    """Return a note on saliency routers that are inert, a warning of ones that take over, or "".

    From summed `routing_sums`: their logits' spread over tokens against the gate's, over all layers and times.
    """
    by_range = sums[:, _LAYER_SUMS:_SUMS].view(len(sums), len(TIME_RANGES), INFLUENCE_COLUMNS)
    figures = influence_figures(by_range.sum((0, 1)).tolist())
    found = (
        f"step {step}: logits of the saliency routers vary over tokens {figures.get('spread', 0.0):.2g} times as much "
        "as those of the gates"
    )
    strength = strength_of(figures)
    if strength == "inert":
        return (
            f"note: {found}, so they change few choices yet. They start at zero: this is expected in a "
            "short run at the default learning rate; --optim.lr_scale '{saliency_router: 20}' makes them learn faster"
        )
    if strength == "takes over":
        return f"warning: {found}: gates hardly matter; lower their learning rate or loss.routing_weight"
    return ""


def rows_taken(sums: Tensor) -> float:
    """Return the rows that experts computed, over all layers and steps of `sums`. Waits for the device."""
    return float(sums[:, _SUMS:].sum())


def _memory_mib() -> float:
    """Return peak memory in MiB: of the accelerator where there is one, else resident memory of this process."""
    device = default_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
