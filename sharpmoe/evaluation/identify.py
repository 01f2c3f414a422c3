"""Identify a published checkpoint: families whose key names it has, sizes, and its loss under each time convention.

Key names of the families coincide while their conventions differ, so a wrong choice fails silently: the network runs
and predicts nonsense. Only its loss on real samples shows the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.schema import Batch
from sharpmoe.config import ModelConfig
from sharpmoe.errors import CheckpointError
from sharpmoe.evaluation.held_out import Samples
from sharpmoe.evaluation.validation import validate
from sharpmoe.model.published.load import build_published
from sharpmoe.model.published.names import CONVENTIONS, DEFAULTS, Convention, PublishedDefaults
from sharpmoe.model.published.sizes import PublishedSizes, matching_families, read_sizes

_PLAUSIBLE = 0.9  # a trained model has less than this fraction of the loss of predicting zero


class ConventionLoss(NamedTuple):
    """The held-out flow loss of a checkpoint under one time convention."""

    families: tuple[str, ...]  # that have this convention
    router: str
    convention: Convention
    loss: float
    error: float  # standard error over images

    def __str__(self) -> str:
        """Return one row of the table in `Identification.__str__`."""
        c = self.convention
        is_noise = c.prediction == "ddpm_noise"
        time = "DDPM step" if is_noise else f"{c.time_scale:g} t + {c.time_shift:g}"
        predicts = "noise" if is_noise else "noise - data" if c.sign > 0 else "data - noise"
        loss = f"{self.loss:.4f} +- {self.error:.4f}"
        return f"{self.router:<10} {time:<22} {predicts:<14} {loss:<18} {', '.join(self.families)}"


@dataclass(frozen=True, kw_only=True)
class Identification:
    """What is known of a published checkpoint; str() is the text for people."""

    candidates: tuple[tuple[str, str], ...]  # (family, router) whose key names it has
    sizes: PublishedSizes
    parameters: int
    losses: tuple[ConventionLoss, ...]  # lowest first; empty without samples
    zero_loss: float  # loss of predicting zero velocity; NaN without samples

    def problem(self, family: str | None = None) -> str | None:
        """Return in one line what is wrong with the checkpoint, or with calling it `family`; None if nothing is."""
        if family is not None and family not in dict(self.candidates):
            return f"it does not have the key names of family {family}; candidates: {self._candidate_names()}"
        if not self.losses:
            return None
        best = self.losses[0]
        if best.loss > _PLAUSIBLE * self.zero_loss:
            return (
                f"under no convention is its loss ({best.loss:.4f} at best) well below that of predicting zero "
                f"({self.zero_loss:.4f}): it is untrained, made for other latents, or has an unknown convention"
            )
        if family is not None and family not in best.families:
            loss = min(measured.loss for measured in self.losses if family in measured.families)
            return (
                f"its time convention is not that of family {family}: its loss is {loss:.4f} under that one and "
                f"{best.loss:.4f} under that of {', '.join(best.families)}; choose one of these"
            )
        return None

    def __str__(self) -> str:
        """Return candidates, parameters, sizes and, where they were measured, the losses as lines of text."""
        sizes = {**self.sizes.read, **{key: f"{value} (assumed)" for key, value in self.sizes.assumed.items()}}
        lines = [
            f"candidates  {self._candidate_names()}",
            *self._undecided(),
            f"parameters  {self.parameters / 1e6:.3f} million",
            "sizes       " + ", ".join(f"{key} {value}" for key, value in sizes.items()),
        ]
        if self.losses:
            lines += ["", f"{'router':<10} {'time embedder input':<22} {'predicts':<14} {'flow loss':<18} families"]
            lines += [str(measured) for measured in self.losses]
            lines.append(f"{'':<10} {'':<22} {'zero':<14} {self.zero_loss:.4f}")
        return "\n".join(lines)

    def _undecided(self) -> list[str]:
        """Return lines that say what key names and shapes leave open, and what decides it."""
        families, routers = (tuple(dict.fromkeys(column)) for column in zip(*self.candidates, strict=True))
        lines = []
        if len(families) > 1 and not self.losses:
            lines.append(f"undecided   family: {', '.join(families)} have these key names; the loss tells: --shards")
        if len(routers) > 1:
            lines.append(f"undecided   router: {', '.join(routers)} have the same tensors; the publication tells")
        return lines

    def _candidate_names(self) -> str:
        return ", ".join(f"{family}/{router}" for family, router in self.candidates)


def identify(
    state: Mapping[str, Tensor],
    samples: Samples | None,
    images: int = 64,
    sizes: Mapping[str, Any] | None = None,
    device: str = "cpu",
    where: str = "the checkpoint",
) -> Identification:
    """Identify a published state dict; with held-out `samples`, also measure its loss under every known convention.

    `sizes` are fields that its tensors cannot show, as `load_pretrained` takes them. `device`: of the model while its
    loss is measured. Raises CheckpointError, which names `where`, where no family has these key names.
    """
    known = tuple(matching_families(state))
    if not known:
        raise CheckpointError(
            f"{where}: no published family has these key names ({', '.join(list(state)[:3])}); expected "
            "blocks.N.mlp... or blocks.N.moe..."
        )
    try:
        read = read_sizes(state, known[0][1], DEFAULTS[known[0][0]], (sizes or {}).get("num_classes"))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    routers = tuple(dict.fromkeys(router for _, router in known))
    losses: list[ConventionLoss] = []
    if samples is not None:
        losses = [
            _measure(state, kind, router, samples, images, sizes or {}, device)
            for router in routers
            for kind in dict.fromkeys(_kind(state, family) for family in CONVENTIONS)
        ]
    return Identification(
        candidates=known,
        sizes=read,
        parameters=sum(value.numel() for value in state.values()),
        losses=tuple(sorted(losses, key=lambda measured: measured.loss)),
        zero_loss=math.nan if samples is None else _loss_of_zero(samples, images),
    )


class _Kind(NamedTuple):
    """What a family decides beside names: families of one kind compute the same function of a state dict."""

    convention: Convention
    defaults: PublishedDefaults  # for what the state dict leaves out


def _kind(state: Mapping[str, Tensor], family: str) -> _Kind:
    defaults = DEFAULTS[family]
    return _Kind(CONVENTIONS[family], defaults._replace(positions="sincos") if "pos_embed" in state else defaults)


def _measure(
    state: Mapping[str, Tensor],
    kind: _Kind,
    router: str,
    samples: Samples,
    images: int,
    sizes: Mapping[str, Any],
    device: str,
) -> ConventionLoss:
    model, _ = build_published(state, kind.convention, router, "checkpoint", kind.defaults, **sizes)
    _check_shape(model.config, samples)
    if model.config.conditioning == "class":
        samples = _KnownLabels(samples, model.config)
    result = validate(model.to(device), samples, images=images)
    families = tuple(name for name in CONVENTIONS if _kind(state, name) == kind)
    return ConventionLoss(families, router, kind.convention, result.mean, result.error)


class _KnownLabels:
    """Samples whose missing or out-of-range class labels are replaced by "no class"."""

    def __init__(self, samples: Samples, config: ModelConfig) -> None:
        self._samples, self._num_classes, self._has_null = samples, config.num_classes, config.class_dropout
        self.num_samples, self.buckets = samples.num_samples, samples.buckets

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self._samples.batch(indices)
        known = (batch.label >= 0) & (batch.label < self._num_classes)
        if not self._has_null and not known.all():
            raise CheckpointError(
                f"the shards hold labels beyond the {self._num_classes} classes of the checkpoint, and its label table "
                'has no row for "no class"; name shards with its labels'
            )
        return batch._replace(label=torch.where(known, batch.label, self._num_classes))

    def bucket_of(self, index: int) -> str:
        return self._samples.bucket_of(index)


def _check_shape(config: ModelConfig, samples: Samples) -> None:
    expected = (config.latent_channels, config.latent_size, config.latent_size)
    found = [bucket.latent for bucket in samples.buckets.values()]
    if not any(latent[0] == expected[0] and math.prod(latent) == math.prod(expected) for latent in found):
        # Any aspect ratio is accepted, and other sizes beside.
        raise CheckpointError(
            f"the checkpoint takes latents {expected}, the shards hold {', '.join(map(str, found))}; name other "
            f"shards, or ask for positions of another size (--latent-size {found[0][1]})"
        )


def _loss_of_zero(samples: Samples, images: int) -> float:
    indices = range(min(images, samples.num_samples))
    squares = [samples.batch([index]).latent.square().mean().item() for index in indices]
    return 1 + sum(squares) / len(squares)  # E |noise - data|^2 with unit noise
