"""Sample batches for the ADM evaluator (guided-diffusion), with the protocol they were drawn under written beside.

FID-50K is the name of a figure of 50,000 images; a figure of fewer is named by their number.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpmoe import durable, sampling
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.held_out import evaluating
from sharpmoe.model.dit import DiT
from sharpmoe.model.embed import ClassCondition

FULL = 50_000


class Batch(NamedTuple):
    """A batch to be drawn."""

    path: Path  # the .npz
    num_images: int
    image_size: int  # pixels, each way
    batch_size: int  # images per model call and branch
    weights: str  # what they are, for the protocol
    part: sampling.Part = sampling.Part()  # which of the images

    @property
    def file(self) -> Path:
        """Where the part goes: NAME.npz, or NAME.part2of8.npz."""
        number, of = self.part
        return self.path if of == 1 else self.path.with_name(f"{self.path.stem}.part{number}of{of}.npz")

    @property
    def rows(self) -> range:
        """Images of the part."""
        return self.part.rows(self.num_images, self.batch_size)


def balanced_labels(count: int, num_classes: int) -> tuple[int, ...]:
    """Label of every image: image i has class i mod num_classes, so that no two classes differ by more than one."""
    return tuple(index % num_classes for index in range(count))


def chunks(rows: range, size: int) -> Iterator[range]:
    """Cut image numbers into ranges of at most `size`."""
    return (range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8 by DiT's rule, truncating 127.5 x + 128."""
    levels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def write_batch(path: Path, batches: Iterable[np.ndarray], count: int, image_size: int) -> Path:
    """Write images (B, H, W, 3) uint8 as arr_0 (count, H, W, 3) of an .npz, never all in memory.

    The file appears under its name when it is complete. Raises ConfigError where the batches hold another number.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, 3)}
    written = 0
    durable.remove_drafts(path.parent, path.name)
    with durable.atomic_draft(path) as draft:
        with zipfile.ZipFile(draft, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in batches:
                written += len(pixels)
                file.write(pixels.tobytes())
        if written != count:
            raise ConfigError(f"{path}: {written} images were drawn, expected {count}")
    return path


def figure_name(count: int) -> str:
    """What a Frechet distance of `count` images may be called."""
    return "FID-50K" if count == FULL else f"FID of {count} images, not FID-50K"


def protocol(count: int, sample: SampleConfig, model: ModelConfig, weights: str) -> dict[str, Any]:
    """How a batch was drawn: everything a figure must be read with."""
    return {
        "figure": figure_name(count),
        "images": count,
        "labels": f"balanced: image i has class i mod {model.num_classes}",
        "steps": sample.num_steps,
        "grid": f"linspace(1, 0, {sample.num_steps} + 1), 1 is noise",
        "method": sample.method,
        "cfg_scale": sample.cfg_scale,
        "guidance_source": sample.guidance_source,
        "seed": sample.seed,
        "weights": weights,
        "model": f"{model.router} DiT {model.width}/{model.depth}/{model.num_heads}",
        "pixels": "truncated 127.5 x + 128, uint8",
        "extractor": "none here: evaluate with guided-diffusion's evaluator.py (TensorFlow Inception-v3) and its "
        "reference batch",
    }


def write_protocol(path: Path, told: dict[str, Any]) -> Path:
    """Write the protocol beside the batch: NAME.npz gets NAME.json."""
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return beside


def draw_batch(model: DiT, sample: SampleConfig, decode: Callable[[Tensor], Tensor], batch: Batch) -> Path:
    """Draw, decode and write a batch of a class-conditional model; returns the .npz. A whole one gets its protocol.

    Image i is the same whatever the batch size (DiffMoE's pool is the exception): its noise is keyed by (seed, i).
    Raises ConfigError for a model of another kind.
    """
    config = model.config
    if config.conditioning != "class":
        raise ConfigError("--npz needs a class-conditional model; draw captions with --captions or --captions-file")
    drawn = _images(model, sample, decode, batch)
    path = write_batch(batch.file, map(to_bytes, drawn), len(batch.rows), batch.image_size)
    if batch.part.of == 1:
        write_protocol(path, protocol(batch.num_images, sample, config, batch.weights))
    return path


def join_batch(model: ModelConfig, sample: SampleConfig, batch: Batch, parts: int) -> Path:
    """Join what `parts` processes have drawn into one batch with its protocol; returns the .npz.

    Raises ConfigError where a part is missing or of another size.
    """
    files = [batch._replace(part=sampling.Part(number, parts)) for number in range(1, parts + 1)]
    path = write_batch(batch.path, map(_pixels_of, files), batch.num_images, batch.image_size)
    write_protocol(path, protocol(batch.num_images, sample, model, batch.weights))
    return path


def _pixels_of(batch: Batch) -> np.ndarray:
    try:
        with np.load(batch.file, allow_pickle=False) as archive:
            pixels: np.ndarray = archive["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise ConfigError(
            f"{batch.file}: missing or damaged; draw it with --part {batch.part.number}/{batch.part.of}"
        ) from None
    expected = (len(batch.rows), batch.image_size, batch.image_size, 3)
    if pixels.shape != expected:
        raise ConfigError(
            f"{batch.file}: holds {pixels.shape}, expected {expected}; draw all parts with the same options"
        )
    return pixels


def _images(model: DiT, sample: SampleConfig, decode: Callable[[Tensor], Tensor], batch: Batch) -> Iterator[Tensor]:
    labels = torch.tensor(balanced_labels(batch.num_images, model.config.num_classes))
    device = next(model.parameters()).device
    with evaluating(model):
        for rows in chunks(batch.rows, batch.batch_size):
            cond = ClassCondition(labels[rows.start : rows.stop].to(device))
            empty = sampling.empty_condition(cond, model.config, None) if model.config.class_dropout else None
            request = sampling.Request(cond, empty, tuple(rows))
            yield decode(sampling.generate(model, model.config, sample, request, batch_size=batch.batch_size))
