"""Judge samples while a run trains: a fixed set of held-out captions or classes, drawn with fixed noise.

Every rank draws its share with the model of the monitor, the features are added up, and rank 0 compares them with those
of the very images whose captions or classes were drawn. The figures of two steps differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.encode.codecs import Codec
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import LogConfig, RunConfig, SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.extractors import Extractor, ExtractorOptions, Features, open_extractor
from sharpmoe.evaluation.held_out import Share, chunks_of_rank, evaluating, held_out_condition, spread
from sharpmoe.evaluation.image_sets import decoded_pixels
from sharpmoe.evaluation.metrics import METRICS, Figure, JudgedSets, MetricSettings
from sharpmoe.evaluation.sample_metrics import full_name
from sharpmoe.model.backbone import Backbone, Condition

_BATCH = 16  # images per call: of the model, the codec and the extractor
_LITE0_BYTES = 19_000_000  # of efficientnet-lite0, whose weights come in a package
_KEY = "log.metrics_extractor"


@dataclass(frozen=True, kw_only=True)
class SampleJudge:
    """What samples are drawn of and judged with; made once, on every rank."""

    request: sampling.Request
    size: tuple[int, int]  # of the latents
    labels: Tensor | None  # (N,) that the samples should have, where the extractor knows them
    sample: SampleConfig
    codec: Codec
    extractor: Extractor
    reference: Features  # of the images whose captions or classes are drawn
    settings: MetricSettings

    @classmethod
    def open(cls, run: RunConfig, held_out: ShardSet, codec: Codec, device: torch.device) -> SampleJudge:
        """Read the images, their conditions and their features. No communication.

        Raises ConfigError where the extractor cannot be had or does not fit the model, DataError for damaged samples.
        """
        log, model = run.log, run.model
        if model.latent_frames > 1:
            raise ConfigError(
                f"log.metrics_every judges still images, the model has {model.latent_frames} frames; set it to 0"
            )
        sample = run.sample.model_copy(update={"num_steps": log.metrics_steps or run.sample.num_steps})
        sampling.CfgSettings.of(model, sample)  # raises for guidance that is impossible
        rows = held_out.indices_of(held_out.main_bucket)
        indices = tuple(int(rows[place]) for place in spread(len(rows), log.metrics_images))
        extractor = _open_extractor(log, device)
        metrics: tuple[str, ...] = log.metrics
        if extractor.num_classes is not None and model.conditioning == "class":
            if extractor.num_classes != model.num_classes:
                raise ConfigError(
                    f"{_KEY}: the classifier knows {extractor.num_classes} classes, the model has {model.num_classes}; "
                    "name one of the run's data in log.metrics_weights, or take another extractor"
                )
            metrics += ("accuracy",)
        fewest = max(METRICS[name].fewest for name in metrics)
        if len(indices) < fewest:
            raise ConfigError(
                f"log.metrics_images: {len(indices)} held-out image(s) of {held_out.main_bucket}, but "
                f"{', '.join(metrics)} need {fewest} or more; raise it, or prepare a larger held-out split"
            )
        _, height, width = held_out.buckets[held_out.main_bucket].latent
        request, labels, reference = _read(held_out, indices, run, codec, extractor, device)
        return cls(
            request=request,
            size=(height, width),
            labels=labels if "accuracy" in metrics else None,
            sample=sample,
            codec=codec,
            extractor=extractor,
            reference=reference,
            settings=MetricSettings(metrics=metrics, subset_size=max(2, len(indices) // 2)),
        )

    @property
    def title(self) -> str:
        """What the figures are of."""
        count, steps = len(self.request.indices), self.sample.num_steps
        return f"{count} samples of {steps} steps, features of {self.extractor.name}"

    def draw(self, model: Backbone, share: Share) -> Features:
        """Draw the samples and return their features, the same on every rank. Communicates by `share.reduce`.

        Every rank calls the model equally often, and images share a call with the same others on any number of ranks.
        """
        pool = torch.zeros_like(self.reference.pool)
        logits = None if self.reference.logits is None else torch.zeros_like(self.reference.logits)
        for _, rows, counted in chunks_of_rank([range(len(pool))], _BATCH, share):
            request = self.request.select(rows)
            with evaluating(model):
                options = sampling.SamplingOptions(batch_size=_BATCH, size=self.size)
                latents = sampling.generate(model, model.config, self.sample, request, options)
            found = self.extractor.compute(decoded_pixels(self.codec, latents.cpu()))
            if counted:
                pool[rows.start : rows.stop] = found.pool.float().cpu()
                if logits is not None and found.logits is not None:
                    logits[rows.start : rows.stop] = found.logits.float().cpu()
        device = self.request.cond[0].device
        pool = share.reduce(pool.to(device)).cpu()
        return Features(pool, logits=None if logits is None else share.reduce(logits.to(device)).cpu())

    def judge(self, samples: Features) -> dict[str, Figure]:
        """Compute the figures by name, such as fd and kid. No communication."""
        sets = JudgedSets(self.reference, samples, labels=self.labels)
        found: dict[str, Figure] = {}
        for name in self.settings.metrics:
            figures = METRICS[name].compute(sets, self.settings)
            found |= {full_name(key, self.extractor): figure for key, figure in figures.items()}
        return found


def metrics_line(found: Mapping[str, Figure]) -> str:
    """Return figures on one line."""
    return ", ".join(f"{name} {figure.value:.4g}" for name, figure in found.items())


def extractor_bytes(log: LogConfig) -> int:
    """Return the bytes that the network takes on each rank while a run trains, by the size of its files; 0 for none."""
    if not log.metrics_every:
        return 0
    if log.metrics_weights is None:
        return _LITE0_BYTES
    path = Path(log.metrics_weights)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _open_extractor(log: LogConfig, device: torch.device) -> Extractor:
    weights = None if log.metrics_weights is None else Path(log.metrics_weights)
    try:
        return open_extractor(ExtractorOptions(log.metrics_extractor, weights, device=device))
    except ConfigError as error:
        said = str(error).replace("--extractor-weights", "log.metrics_weights").replace("--extractor", _KEY)
        raise ConfigError(said) from None


def _read(
    held_out: ShardSet,
    indices: Sequence[int],
    run: RunConfig,
    codec: Codec,
    extractor: Extractor,
    device: torch.device,
) -> tuple[sampling.Request, Tensor, Features]:
    """Return the request, the labels and the features of held-out images, a batch in memory at a time."""
    conditions: list[Condition] = []
    labels, pools, logits = [], [], []
    for start in range(0, len(indices), _BATCH):
        batch = held_out.batch(list(indices[start : start + _BATCH]))
        conditions.append(held_out_condition(batch, run.model, device))
        labels.append(batch.label)
        found = extractor.compute(decoded_pixels(codec, batch.latent))
        pools.append(found.pool.float().cpu())
        logits += [] if found.logits is None else [found.logits.float().cpu()]
    cond = sampling.join_conditions(tuple(conditions))
    empty = None
    if run.model.conditioning == "text":
        empty = sampling.empty_condition(cond, run.model, held_out.empty_text())
    elif run.model.class_dropout:
        empty = sampling.empty_condition(cond, run.model, None)
    reference = Features(torch.cat(pools), logits=torch.cat(logits) if logits else None)
    return sampling.Request(cond, empty, tuple(indices)), torch.cat(labels), reference
