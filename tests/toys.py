"""Tiny models and held-out samples, in memory, for tests of sampling, evaluation, report and metrics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.index import Bucket, bucket_name
from data_pipeline.schema import Batch
from sharpmoe.config import ModelConfig
from sharpmoe.model.backbone import Backbone
from sharpmoe.model.build import build_model

TEXT_WIDTH, POOLED_WIDTH, TEXT_LENGTH = 6, 4, 3


def toy_config(router: str = "diffmoe", **fields: object) -> ModelConfig:
    """16 tokens, two MoE layers of four experts."""
    sizes = {"width": 24, "depth": 4, "num_heads": 2, "latent_size": 8, "num_experts": 4}
    widths = {"text_width": TEXT_WIDTH, "pooled_width": POOLED_WIDTH}
    return ModelConfig(router=router, **(sizes | widths | fields))


def toy_model(router: str = "diffmoe", **fields: object) -> Backbone:
    """A model whose every parameter matters (zero-initialised ones are moved), in eval mode."""
    torch.manual_seed(0)
    model = build_model(toy_config(router, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.moe_layers():
            if router == "diffmoe":
                layer.expert_threshold.fill_(0.5)
    return model.eval()


class ToySamples:
    """Held-out samples drawn from their index; every fifth has no foreground mask.

    `sizes` of latents, (H, W) or (T, H, W): as many samples of each, one size after the other. `labels`: how many there
    are; None: no sample has one.
    """

    def __init__(
        self, num_samples: int = 11, sizes: Sequence[tuple[int, ...]] = ((8, 8),), labels: int | None = None
    ) -> None:
        self.num_samples, self._each, self._labels = num_samples, -(-num_samples // len(sizes)), labels
        self.buckets = {}
        for *frames, h, w in sizes:
            bucket = Bucket((8 * h, 8 * w), (4, *frames, h, w), (*frames, h // 2, w // 2), self._each)
            self.buckets[bucket_name(bucket.image, bucket.frames)] = bucket
        self.read: list[list[int]] = []  # indices of every batch that was asked for

    def batch(self, indices: Sequence[int], positions: Sequence[int] | None = None) -> Batch:
        self.read.append(list(indices))
        rows = [self._row(index) for index in indices]
        latent, text, pooled, saliency, foreground = (torch.stack(column) for column in zip(*rows, strict=True))
        count = len(indices)
        return Batch(
            latent=latent,
            text=text,
            text_mask=torch.ones(count, TEXT_LENGTH, dtype=torch.bool),
            pooled=pooled,
            label=torch.tensor([-1 if self._labels is None else index % self._labels for index in indices]),
            saliency=saliency,
            foreground=foreground,
            position=torch.tensor(indices),
            keys=tuple(f"sample{index}" for index in indices),
            captions=tuple(f"caption {index}" for index in indices),
        )

    def bucket_of(self, index: int) -> str:
        return list(self.buckets)[index // self._each]

    def _row(self, index: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(index)
        shape = self.buckets[self.bucket_of(index)].latent
        tokens = self.buckets[self.bucket_of(index)].tokens
        foreground = (torch.rand(tokens, generator=g) > 0.5).float()
        return (
            torch.randn(shape, generator=g),
            torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=g),
            torch.randn(POOLED_WIDTH, generator=g),
            torch.rand(tokens, generator=g),
            foreground if index % 5 else torch.full_like(foreground, torch.nan),
        )
