"""A record of routing: how many tokens of each image every expert took, by denoising step and MoE layer.

`evaluate.py RUN --record-routing FILE` writes it, `plan.py --replay FILE` reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES
from sharpmoe.evaluation.held_out import Samples, observe, spread
from sharpmoe.invocation import spell_command
from sharpmoe.model.backbone import Backbone

_FORMAT = "sharpmoe-routing-1"


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """Tokens per expert of I images, T denoising steps, L MoE layers and E experts."""

    model: str  # the weights that were recorded, for people
    router: str
    width: int  # values of a token
    times: tuple[float, ...]  # (T), descending
    blocks: tuple[int, ...]  # (L), the blocks whose MoE layers these are
    loads: Tensor  # (I, T, L, E) int64, an unconditional expert last

    @property
    def title(self) -> str:
        """The sizes of the record, for people."""
        images, times, layers, experts = self.loads.shape
        return f"{images} images, {times} steps, {layers} MoE layers, {experts} experts"

    @property
    def ep_sizes(self) -> list[int]:
        """The divisors of the number of experts above one: ranks that can share them."""
        experts = self.loads.shape[-1]
        return [size for size in range(2, experts + 1) if experts % size == 0]

    def save(self, path: Path | str) -> Path:
        """Write the record as JSON, creating its folder. Raises OSError."""
        path = Path(path)
        content = {"format": _FORMAT, **asdict(self), "loads": self.loads.tolist()}
        write_atomically(path, json.dumps(content) + "\n")
        return path

    @classmethod
    def load(cls, path: Path | str) -> RoutingRecord:
        """Read a file of `save`. Raises DataError where it is missing, damaged or something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format", None) != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            loads = torch.tensor(content.pop("loads"), dtype=torch.int64)
            times, blocks = tuple(content.pop("times")), tuple(content.pop("blocks"))
            record = cls(**content, times=times, blocks=blocks, loads=loads)
            fits = loads.ndim == 4 and loads.numel() and loads.shape[1:3] == (len(times), len(blocks))
            if not fits or (loads < 0).any():
                raise ValueError(f"loads of shape {tuple(loads.shape)} do not fit its times and blocks")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: not a record of routing ({error}); write one with "
                f"`{spell_command('evaluate')} RUN --record-routing FILE`"
            ) from None
        return record


def record_routing(
    model: Backbone, samples: Samples, *, name: str, images: int = 128, chunk: int = 16, seed: int = 0
) -> RoutingRecord:
    """Roll the model out over held-out samples as `measure_allocation` does and count the tokens of every expert.

    Inference: DiffMoE's experts take what is above their thresholds. Raises ConfigError for a model without experts.
    """
    if not model.moe_layers():
        raise ConfigError(f"{name}: the model has no MoE layer, so that there is no routing to record")
    indices = spread(samples.num_samples, images)
    observed = observe(model, samples, indices, ALLOCATION_TIMES, seed=seed, chunk=chunk)
    config = model.config
    return RoutingRecord(
        model=name,
        router=config.router,
        width=config.width,
        times=ALLOCATION_TIMES,
        blocks=tuple(number for number in range(config.depth) if config.is_moe(number)),
        loads=observed.loads.long(),
    )
