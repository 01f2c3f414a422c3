"""From captions to picture files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.held_out import evaluating
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import ClassCondition
from sharpmoe.report import figures


class Wish(NamedTuple):
    """What is to be drawn: captions for a text-conditional model, or class labels."""

    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def titles(self) -> tuple[str, ...]:
        """What stands under each picture."""
        return self.captions or tuple(f"class {label}" for label in self.labels)


def read_captions(path: Path | str) -> tuple[str, ...]:
    """Captions of a text file, one a line; blank lines are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a caption file ({error}); expected UTF-8 text") from None
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise DataError(f"{path}: holds no captions; expected one a line")
    return captions


def check_shards(model: DiT, shards: ShardSet) -> DiT:
    """Return the model, or raise DataError where it does not fit the codec or the text encoder of the shards."""
    config = model.config
    wanted: dict[str, tuple[int, ...]] = {
        "latent shape": (config.latent_channels, config.latent_size, config.latent_size)
    }
    alike = math.prod(shards.latent_shape[1:]) == config.latent_size**2  # any aspect will do
    square = (shards.latent_shape[0], config.latent_size, config.latent_size)
    found: dict[str, tuple[int, ...]] = {"latent shape": square if alike else shards.latent_shape}
    if config.conditioning == "text":
        wanted |= {"text widths": (config.text_width, config.pooled_width)}
        found |= {"text widths": (shards.text_width, shards.pooled_width)}
    for what, expected in wanted.items():
        if found[what] != expected:
            raise DataError(
                f"{shards.location}: {what} {found[what]}, the model has {expected}; name the shards the model was "
                "trained on (--shards)"
            )
    return model


def latent_size(shards: ShardSet, bucket: str | None) -> tuple[int, int] | None:
    """Latent (h, w) of a resolution of the shards, None for None. ConfigError where they have no such resolution."""
    if bucket is None:
        return None
    if bucket not in shards.buckets:
        raise ConfigError(f"--bucket {bucket}: {shards.location} has {', '.join(shards.buckets)} (H x W pixels)")
    return shards.buckets[bucket].latent[1:]


def with_overrides(settings: SampleConfig, given: Mapping[str, object]) -> SampleConfig:
    """Replace fields of a sample section by those `given` that are not None; ConfigError where one is out of range."""
    changed = {field: value for field, value in given.items() if value is not None}
    try:
        return SampleConfig(**{**settings.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"sample.{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None


def request(config: ModelConfig, shards: ShardSet, wish: Wish, device: torch.device | str = "cpu") -> sampling.Request:
    """Encode a wish with the text encoder of the shards, to `device`. Raises ConfigError where it is empty."""
    if config.conditioning == "class":
        if not wish.labels:
            raise ConfigError("the model is class-conditional: give --labels, not captions")
        cond = ClassCondition(torch.tensor(wish.labels, device=device))
        empty = sampling.empty_condition(cond, config, None) if config.class_dropout else None
        return sampling.Request(cond, empty, tuple(range(len(wish.labels))))
    if not wish.captions:
        raise ConfigError("no captions to draw: give --captions, --captions-file, or sample.captions in the run file")
    states, mask, pooled = shards.text_encoder().encode(list(wish.captions))
    text = (states.to(device), mask.to(device), pooled.to(device))
    return sampling.caption_request(text, shards.empty_text(), config)


def draw(
    model: DiT,
    asked: sampling.Request,
    settings: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    batch_size: int = 16,
    pool_per_image: bool = False,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Sample and decode images (B, 3, H, W) in [-1, 1] on the CPU; the model's mode is restored.

    `size` (h, w) of the latents; square where it is not given.
    """
    with evaluating(model):
        latents = sampling.generate(
            model, model.config, settings, asked, batch_size=batch_size, pool_per_image=pool_per_image, size=size
        )
    return decode(latents.cpu())


def write(folder: Path | str, images: Tensor, titles: Sequence[str], first: int = 0, grid: str = "grid") -> list[Path]:
    """Write one PNG per image, numbered from `first`, and a grid; returns the paths, the grid last."""
    folder = Path(folder)
    paths = [
        figures.save(pixels, folder / f"{i:03}_{slug(title)}.png")
        for i, (pixels, title) in enumerate(zip(figures.to_pixels(images), titles, strict=True), first)
    ]
    return [*paths, figures.save(figures.sample_grid(images, titles), folder / f"{grid}.png")]


def parse_part(text: str) -> sampling.Part:
    """Read `3/8`, the third of eight parts. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: expected NUMBER/PARTS, such as 1/8 for the first of eight")
    return sampling.Part(int(match[1]), int(match[2]))


def slug(text: str, length: int = 48) -> str:
    """Turn a caption into part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "image"
