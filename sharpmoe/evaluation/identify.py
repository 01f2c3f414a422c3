"""What a published checkpoint is: families whose key names it has, sizes, and the loss under each time convention.

Key names of the families coincide while their conventions differ, so a wrong load fails silently: the network runs and
predicts nonsense. Only its loss on real samples tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.evaluation.held_out import Samples
from sharpmoe.evaluation.validation import validate
from sharpmoe.model.published.load import build_published
from sharpmoe.model.published.names import CONVENTIONS, Convention
from sharpmoe.model.published.sizes import PublishedSizes, matching_families, read_sizes

PLAUSIBLE = 0.9  # a trained model has less than this share of the loss of predicting nothing


class Finding(NamedTuple):
    """The held-out flow loss of a checkpoint under one convention."""

    families: tuple[str, ...]  # that have this convention
    router: str
    convention: Convention
    loss: float
    error: float  # standard error over images


class Inspection(NamedTuple):
    """What is known of a checkpoint."""

    candidates: tuple[tuple[str, str], ...]  # (family, router) whose key names it has
    sizes: PublishedSizes
    parameters: int
    findings: tuple[Finding, ...]  # lowest loss first; empty without samples
    nothing: float  # loss of predicting zero velocity; NaN without samples


class WithLabels:
    """Samples whose missing or foreign class labels are replaced by "no class"."""

    def __init__(self, samples: Samples, num_classes: int) -> None:
        self._samples, self._num_classes = samples, num_classes
        self.num_samples = samples.num_samples

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read samples (see ShardSet.batch)."""
        batch = self._samples.batch(indices)
        known = (batch.label >= 0) & (batch.label < self._num_classes)
        return batch._replace(label=torch.where(known, batch.label, self._num_classes))

    def bucket_of(self, index: int) -> str:
        """Name of a sample's resolution."""
        return self._samples.bucket_of(index)


def inspect(
    state: Mapping[str, Tensor], samples: Samples | None, images: int = 64, sizes: Mapping[str, Any] | None = None
) -> Inspection:
    """Tell what a published state dict is; with held-out `samples`, measure it under every convention.

    `sizes` are fields that its tensors cannot tell, as `load_pretrained` takes them. Raises CheckpointError where no
    family has these key names.
    """
    known = tuple(matching_families(state))
    if not known:
        raise CheckpointError("no published family has these key names; expected blocks.N.mlp... or blocks.N.moe...")
    routers = tuple(dict.fromkeys(router for _, router in known))
    found: list[Finding] = []
    nothing = float("nan")
    if samples is not None:
        for router in routers:
            found += [_measure(state, *case, router, samples, images, sizes or {}) for case in _conventions()]
        nothing = _loss_of_nothing(samples, images)
    parameters = sum(value.numel() for value in state.values())
    return Inspection(
        known, read_sizes(state, routers[0]), parameters, tuple(sorted(found, key=lambda f: f.loss)), nothing
    )


def _conventions() -> list[tuple[Convention, tuple[str, ...]]]:
    unique = dict.fromkeys(CONVENTIONS.values())
    return [(one, tuple(name for name, other in CONVENTIONS.items() if other == one)) for one in unique]


def _measure(
    state: Mapping[str, Tensor],
    convention: Convention,
    families: tuple[str, ...],
    router: str,
    samples: Samples,
    images: int,
    sizes: Mapping[str, Any],
) -> Finding:
    model, _ = build_published(state, convention, router, "checkpoint", **sizes)
    seen = WithLabels(samples, model.config.num_classes) if model.config.conditioning == "class" else samples
    _check_shape(model.config, samples)
    result = validate(model, seen, images=images)
    return Finding(families, router, convention, result.mean, result.error)


def _check_shape(config: ModelConfig, samples: Samples) -> None:
    found = tuple(samples.batch([0]).latent.shape[1:])
    expected = (config.latent_channels, config.latent_size, config.latent_size)
    if found[0] != expected[0] or math.prod(found) != math.prod(expected):  # any aspect will do
        raise CheckpointError(f"the checkpoint takes latents {expected}, the shards hold {found}; name other shards")


def _loss_of_nothing(samples: Samples, images: int) -> float:
    indices = range(min(images, samples.num_samples))
    squares = [samples.batch([index]).latent.square().mean().item() for index in indices]
    return 1 + sum(squares) / len(squares)  # E |noise - data|^2 with unit noise


def verdict(inspection: Inspection, family: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or with calling it `family`, in one line; None where nothing is."""
    if family is not None and family not in dict(inspection.candidates):
        return f"it has not the key names of family {family}; candidates: {_named(inspection.candidates)}"
    if not inspection.findings:
        return None
    best = inspection.findings[0]
    if best.loss > PLAUSIBLE * inspection.nothing:
        return (
            f"under no convention is its loss ({best.loss:.4f} at best) well below that of predicting nothing "
            f"({inspection.nothing:.4f}): untrained, of other latents, or of a convention not known here"
        )
    if family is not None and family not in best.families:
        named = min(finding.loss for finding in inspection.findings if family in finding.families)
        return (
            f"its time convention is not that of family {family}: loss {named:.4f} there, {best.loss:.4f} under that "
            f"of {', '.join(best.families)}; name one of these"
        )
    return None


def text(inspection: Inspection) -> str:
    """Say it in lines."""
    told = {**inspection.sizes.read, **{key: f"{value} (assumed)" for key, value in inspection.sizes.assumed.items()}}
    lines = [
        f"candidates  {_named(inspection.candidates)}",
        f"parameters  {inspection.parameters / 1e6:.3f} million",
        "sizes       " + ", ".join(f"{key} {value}" for key, value in told.items()),
    ]
    if inspection.findings:
        lines += ["", f"{'router':<10} {'time embedder is fed':<22} {'predicts':<14} {'flow loss':<18} families"]
        lines += [_line(finding) for finding in inspection.findings]
        lines.append(f"{'':<10} {'':<22} {'nothing':<14} {inspection.nothing:.4f}")
    return "\n".join(lines)


def _named(found: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{family}/{router}" for family, router in found)


def _line(finding: Finding) -> str:
    c = finding.convention
    is_noise = c.prediction == "ddpm_noise"
    fed = "DDPM step" if is_noise else f"{c.time_scale:g} t + {c.time_shift:g}"
    predicts = "noise" if is_noise else "noise - data" if c.sign > 0 else "data - noise"
    loss = f"{finding.loss:.4f} +- {finding.error:.4f}"
    return f"{finding.router:<10} {fed:<22} {predicts:<14} {loss:<18} {', '.join(finding.families)}"
