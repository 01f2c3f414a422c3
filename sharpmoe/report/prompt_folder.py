"""Draw the pictures of a set of prompts into the folder that a benchmark's tool scores; a killed call goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from torch import Tensor

from data_pipeline.encode.like import OriginCoders
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.console import print_note, progress_bar
from sharpmoe.durable import check_folder, write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.adm import weights_digest
from sharpmoe.evaluation.prompt_sets import (
    PromptSet,
    finish_prompts,
    image_path,
    is_drawn,
    prompt_set_note,
    write_captions,
)
from sharpmoe.model.backbone import Backbone
from sharpmoe.report.figures import save_png, to_pixels
from sharpmoe.report.samples import DrawOptions, Prompts, TextSource, draw_images, encode_prompts


def draw_prompt_folder(
    model: Backbone,
    shards: ShardSet | OriginCoders,
    prompts: PromptSet,
    settings: SampleConfig,
    folder: Path,
    options: DrawOptions,
) -> Path:
    """Draw every picture of `options.part` that is not on the disk yet, a batch at a time; return the folder.

    Image k of prompt p has the noise of (seed, p x each + k), whatever the batches and parts; DiffMoE pools a batch,
    which is why whole batches are drawn again. Raises ConfigError where the folder holds pictures of other settings or
    weights, and for a model that reads no captions.
    """
    check_folder(folder)
    part, device = options.part, next(model.parameters()).device
    _check_same(folder, _draws_of(model, prompts, settings, options))
    write_captions(prompts, folder)
    note = prompt_set_note(prompts)
    if note and part.number == 1:
        print_note(note)
    source, codec = _Texts(shards), shards.codec_object(str(device))
    size = options.size.of_latents(model.config, codec)
    rows = part.rows(prompts.num_images, options.batch_size)
    batches = [range(at, min(at + options.batch_size, rows.stop)) for at in rows[:: options.batch_size]]
    missing = [batch for batch in batches if not all(is_drawn(prompts, folder, image) for image in batch)]
    if 0 < len(missing) < len(batches):
        print_note(f"note: {folder}: going on after {len(batches) - len(missing)} of {len(batches)} batches")
    with progress_bar("drawing", sum(map(len, missing))) as advance:
        for batch in missing:
            texts = tuple(prompts.prompts[prompts.prompt_of(image)] for image in batch)
            request = encode_prompts(model.config, source, Prompts(texts), device)._replace(indices=tuple(batch))
            images = draw_images(model, request, settings, codec.decode, options.of_latents(size))
            for image, pixels in zip(batch, to_pixels(images), strict=True):
                save_png(pixels, image_path(prompts, folder, image))
            finish_prompts(prompts, folder, range(prompts.prompt_of(batch[0]), prompts.prompt_of(batch[-1]) + 1))
            advance(len(batch))
    finish_prompts(prompts, folder, sorted({prompts.prompt_of(image) for image in rows}))
    return folder


def part_of_rank() -> sampling.ImagePart:
    """Return the part of this process where several were started (torchrun, deepspeed): RANK of WORLD_SIZE."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        return sampling.ImagePart()
    return sampling.ImagePart(int(rank) + 1, int(world))


class _Texts:
    """The text encoder of the shards, loaded once for all batches."""

    def __init__(self, shards: TextSource) -> None:
        self._shards = shards
        self._encoder: TextEncoder | None = None
        self._empty: tuple[Tensor, Tensor, Tensor] | None = None

    def text_encoder(self) -> TextEncoder:
        self._encoder = self._encoder or self._shards.text_encoder()
        return self._encoder

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        self._empty = self._empty or self._shards.empty_text()
        return self._empty


def _draws_of(model: Backbone, prompts: PromptSet, settings: SampleConfig, options: DrawOptions) -> str:
    """Return everything that decides the pixels of a folder, as JSON; its parts agree on it."""
    texts = hashlib.sha256("\n".join(prompts.prompts).encode()).hexdigest()
    content = {
        "weights": weights_digest(model),
        "weak": None if options.weak is None else weights_digest(options.weak),
        "prompts": [texts, len(prompts.prompts), prompts.each, prompts.layout],
        "sample": settings.model_dump(mode="json", exclude={"captions"}),
        "batch": [options.batch_size, options.pool_per_image, *options.size],
    }
    return json.dumps(content, sort_keys=True)


def _check_same(folder: Path, draws: str) -> None:
    """Write how the pictures of a folder are drawn, beside it; raise ConfigError where it holds others."""
    occupied = folder.is_dir() and any(folder.iterdir())  # asked first: another part may begin right now
    path = folder.with_name(f"{folder.name}.drawing.json")
    if path.is_file() and path.read_text(encoding="utf-8") != draws:
        raise ConfigError(
            f"{folder}: holds pictures of other weights, prompts or settings ({path.name}); choose another --out, or "
            "delete both"
        )
    if not path.is_file():
        if occupied:
            raise ConfigError(f"{folder}: is not empty, and not of this command; choose another --out")
        write_atomically(path, draws)
