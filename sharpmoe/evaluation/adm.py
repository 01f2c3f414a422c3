"""Sample batches for the ADM evaluator (guided-diffusion): an .npz of images and a JSON file with their protocol.

FID-50K is a figure of 50,000 images; a figure of fewer images is named by their number.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.codecs import frame_by_frame
from sharpmoe import flow, sampling
from sharpmoe.config import ModelConfig, SampleConfig
from sharpmoe.console import print_note, progress_bar
from sharpmoe.devices import send
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.evaluation.held_out import evaluating
from sharpmoe.model.backbone import Backbone, ClassCondition

_FULL = 50_000  # images of FID-50K
_BALANCED = "balanced: image i has class i mod "  # of a protocol, before the number of classes
_PART = "part"  # of a protocol: which part of the batch the file holds; the other keys are those of the whole
_WHOLE = sampling.ImagePart()


@dataclass(frozen=True, kw_only=True)
class AdmBatch:
    """A batch of class-conditional samples, or one part of it."""

    path: Path  # the .npz of the whole batch
    num_images: int  # of the whole batch
    image_size: int  # pixels, each way
    batch_size: int  # images per model call and branch
    weights: str  # description of the weights, for the protocol
    part: sampling.ImagePart = _WHOLE  # which of the images
    weak_weights: str | None = None  # description of the weak model's, where one guides
    frames: int = 1  # of a clip; 1: still images
    dtype: str = "float32"  # of the model's parameters, for the protocol

    @property
    def file(self) -> Path:
        """The .npz of this part: NAME.npz, or NAME.part2of8.npz."""
        number, of = self.part
        return self.path if of == 1 else self.path.with_name(f"{self.path.stem}.part{number}of{of}.npz")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return (H, W, 3) of an image, or (T, H, W, 3) of a clip."""
        return (*([self.frames] if self.frames > 1 else []), self.image_size, self.image_size, 3)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image or clip."""
        return math.prod(self.image_shape)

    @property
    def rows(self) -> range:
        """Image numbers of this part."""
        return self.part.rows(self.num_images, self.batch_size)


def draw_adm_batch(
    model: Backbone,
    sample: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    batch: AdmBatch,
    weak: Backbone | None = None,
) -> Path:
    """Draw, decode and write a batch of a class-conditional model, and its protocol beside it; return the .npz.

    arr_0 is uint8 (N, H, W, 3); of a model with frames, whose clips no published evaluator takes, (N, T, H, W, 3).
    Image i is the same for every batch size (DiffMoE's pool is the exception): its noise is keyed by (seed, i). What is
    drawn stays in NAME.npz.drawing until the .npz is complete, so that the same call goes on where a killed one was; it
    takes as much of the disk again for a while. `weak`: a model to guide away from (`sampling.generate`).
    Raises ConfigError for a model with another conditioning, and where another process draws the same file.
    """
    config = model.config
    if config.conditioning != "class":
        raise ConfigError("--npz needs a class-conditional model; draw captions with --captions or --captions-file")
    drawing = batch.file.with_name(f"{batch.file.name}.drawing")
    key = drawing.with_name(f"{drawing.name}.json")
    if batch.file.is_dir():
        raise ConfigError(f"{batch.file}: is a folder, expected a file; add a file name to --npz")
    drawing.parent.mkdir(parents=True, exist_ok=True)
    digests = {"weights": weights_digest(model)} | ({} if weak is None else {"weak": weights_digest(weak)})
    protocol = _protocol(config, sample, batch) | {f"{name}_sha256": digest for name, digest in digests.items()}
    with drawing.open("a+b") as file:
        _lock(file, batch.file)
        begun = _images_begun(file, key, json.dumps(_draws_of(model, sample, batch, digests), sort_keys=True), batch)
        _draw_missing(file, _images(model, sample, decode, batch, begun, weak), batch, begun)
        batch.file.with_suffix(".json").unlink(missing_ok=True)  # a protocol is never beside other images than its own
        _write_images(batch.file, _pixels_drawn(file, batch), len(batch.rows), batch.image_shape)
        _write_protocol(batch.file, protocol | ({} if batch.part.of == 1 else {_PART: str(batch.part)}))
        for done in (drawing, key):
            done.unlink()
    return batch.file


def _lock(file: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, also by the end of the process
    except BlockingIOError:
        raise ConfigError(f"{target}: another process draws it; wait for it, or write to another --npz") from None
    except OSError:
        pass  # a file system without locks


def weights_digest(model: Backbone) -> str:
    """Return the sha256 of the names and values of a model's weights."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return weights.hexdigest()


def _draws_of(model: Backbone, sample: SampleConfig, batch: AdmBatch, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that decides the pixels of a batch, as JSON values."""
    return {
        **digests,
        "model": model.config.model_dump(mode="json"),
        "sample": sample.model_dump(mode="json"),
        "images": [batch.num_images, batch.image_size, batch.batch_size, *batch.part],
        "device": next(model.parameters()).device.type,
    }


def _images_begun(file: IO[bytes], key: Path, draws: str, batch: AdmBatch) -> int:
    """Return how many images of a killed call can be kept, whole batches; drop the rest, or all drawn otherwise."""
    known = key.is_file() and key.read_text(encoding="utf-8") == draws
    if not known:
        file.truncate(0)
        write_atomically(key, draws)
    images = file.seek(0, os.SEEK_END) // batch.image_bytes
    begun = images if images == len(batch.rows) else images // batch.batch_size * batch.batch_size
    file.truncate(begun * batch.image_bytes)
    if begun:
        print_note(f"note: {batch.file}: going on after {begun} of {len(batch.rows)} images")
    return begun


def _draw_missing(file: IO[bytes], missing: Iterator[Tensor], batch: AdmBatch, begun: int) -> None:
    """Append the images that are not drawn yet, each batch flushed to the disk."""
    with progress_bar("drawing", len(batch.rows) - begun) as advance:
        for images in missing:
            pixels = _to_bytes(images)
            if pixels.shape[1:] != batch.image_shape:
                raise ConfigError(f"{batch.file}: images of {pixels.shape[1:]} drawn, expected {batch.image_shape}")
            file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())
            advance(len(pixels))


def _pixels_drawn(file: IO[bytes], batch: AdmBatch) -> Iterator[np.ndarray]:
    file.seek(0)
    while block := file.read(batch.image_bytes * batch.batch_size):
        yield np.frombuffer(block, np.uint8).reshape(-1, *batch.image_shape)


def join_adm_batch(model: ModelConfig, sample: SampleConfig, batch: AdmBatch, parts: int) -> Path:
    """Join the `parts` parts of a batch, drawn by as many processes, and write their protocol; return the .npz.

    Raises ConfigError where a part is missing, has another size, or was drawn in another way than this call says or
    with other weights than the first.
    """
    files = [replace(batch, part=sampling.ImagePart(number, parts)) for number in range(1, parts + 1)]
    drawn = [_read_protocol(file) for file in files]
    for protocol in drawn:
        protocol.pop(_PART, None)
    expected = drawn[0] | _protocol(model, sample, batch)
    for file, protocol in zip(files, drawn, strict=True):
        _check_same(file, protocol, expected)
    _write_images(batch.path, map(_pixels_of, files), batch.num_images, batch.image_shape)
    _write_protocol(batch.path, expected)
    return batch.path


def _check_same(part: AdmBatch, protocol: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a ConfigError that names the first key in which a part was drawn otherwise."""
    for key in protocol | expected:
        was, now = protocol.get(key), expected.get(key)
        if was != now:
            raise ConfigError(
                f"{part.file}: was drawn with {key} {was!r}, this call or another part says {now!r}; join with the "
                f"options that drew the parts, or draw it again with --part {part.part.number}/{part.part.of}"
            )


def _images(
    model: Backbone,
    sample: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    batch: AdmBatch,
    begun: int,
    weak: Backbone | None,
) -> Iterator[Tensor]:
    """Yield the images of a batch but the first `begun`."""
    labels = torch.tensor(_balanced_labels(batch.num_images, model.config.num_classes))
    device = next(model.parameters()).device
    rows, size = batch.rows, batch.batch_size
    with evaluating(model):
        for start in range(rows.start + begun, rows.stop, size):
            stop = min(start + size, rows.stop)
            cond = ClassCondition(send(labels[start:stop], device))
            empty = sampling.empty_condition(cond, model.config, None) if model.config.class_dropout else None
            request = sampling.Request(cond, empty, tuple(range(start, stop)))
            options = sampling.SamplingOptions(batch_size=size, weak=weak)
            latents = sampling.generate(model, model.config, sample, request, options)
            yield frame_by_frame(decode, latents)


def _balanced_labels(count: int, num_classes: int) -> tuple[int, ...]:
    """Return the label of every image: image i has class i mod num_classes, so class counts differ by at most one."""
    return tuple(index % num_classes for index in range(count))


def _to_bytes(images: Tensor) -> np.ndarray:
    """Convert images (B, 3, [T,] H, W) in [-1, 1] to (B, [T,] H, W, 3) uint8 by DiT's rule: truncate 127.5 x + 128."""
    levels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.movedim(1, -1).cpu().numpy())


def _write_images(path: Path, batches: Iterable[np.ndarray], count: int, shape: tuple[int, ...]) -> None:
    """Write images (B, *shape) uint8 as arr_0 (count, *shape) of an .npz, one batch in memory at a time.

    The file gets its name when it is complete. Raises ConfigError where the batches hold another number of images.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}

    def write(draft: Path) -> None:
        written = 0
        with zipfile.ZipFile(draft, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in batches:
                written += len(pixels)
                file.write(pixels.tobytes())
        if written != count:
            raise ConfigError(f"{path}: {written} images were drawn, expected {count}")

    write_atomically(path, write)


def _pixels_of(batch: AdmBatch) -> np.ndarray:
    try:
        with np.load(batch.file, allow_pickle=False) as archive:
            pixels: np.ndarray = archive["arr_0"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise ConfigError(
            f"{batch.file}: missing or damaged; draw it with --part {batch.part.number}/{batch.part.of}"
        ) from None
    expected = (len(batch.rows), *batch.image_shape)
    if pixels.shape != expected:
        raise ConfigError(
            f"{batch.file}: holds {pixels.shape}, expected {expected}; draw all parts with the same options"
        )
    return pixels


def _protocol(model: ModelConfig, sample: SampleConfig, batch: AdmBatch) -> dict[str, Any]:
    """Return how a batch is drawn, which a published figure must state; of all parts of one batch the same."""
    return {
        "figure": _figure_name(batch.num_images),
        "images": batch.num_images,
        **({"frames": batch.frames} if batch.frames > 1 else {}),
        "labels": f"{_BALANCED}{model.num_classes}",
        "steps": sample.num_steps,
        "grid": f"linspace(1, 0, {sample.num_steps} + 1), 1 is noise{_shift_text(model, sample)}",
        "method": sample.method,
        "cfg_scale": sample.cfg_scale,
        "guidance_source": sample.guidance_source,
        "cfg_norm": sample.cfg_norm,
        "cfg_interval": list(sample.cfg_interval),
        "weak_model": batch.weak_weights or "none",
        "seed": sample.seed,
        "batch_size": batch.batch_size,  # decides which images are in a part, and the pool of DiffMoE
        "weights": batch.weights,
        "dtype": batch.dtype,
        "model": model.title,
        "pixels": "truncated 127.5 x + 128, uint8",
        "extractor": "none here: evaluate with guided-diffusion's evaluator.py (TensorFlow Inception-v3) and its "
        "reference batch",
    }


def _write_protocol(path: Path, protocol: dict[str, Any]) -> None:
    """Write the protocol of a batch, or of a part of one: NAME.json beside NAME.npz."""
    write_atomically(path.with_suffix(".json"), json.dumps(protocol, indent=2) + "\n")


def _read_protocol(part: AdmBatch) -> dict[str, Any]:
    """Read how a part was drawn. Raises ConfigError."""
    file = part.file.with_suffix(".json")
    try:
        protocol: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return dict(protocol)
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"{file}: missing or damaged; draw the part with --part {part.part.number}/{part.part.of}"
        ) from None


def classes_of_batch(path: Path) -> int | None:
    """Return over how many classes a batch is spread, as the protocol beside it says; None without one.

    Raises ConfigError for a part of a batch, whose first image is not of class 0.
    """
    try:
        protocol = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        classes, part = int(str(protocol["labels"]).removeprefix(_BALANCED)), protocol.get(_PART)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if part is not None:
        raise ConfigError(f"{path}: is part {part} of a batch; join its parts first (--join)")
    return classes


def _shift_text(model: ModelConfig, sample: SampleConfig) -> str:
    factor = flow.shift_factor(sample.shift, model.num_tokens)
    return "" if factor == 1 else f", shifted: s t / (1 + (s - 1) t) with s = {factor:.6g}"


def _figure_name(count: int) -> str:
    """Return the name of a Frechet distance of `count` images."""
    return "FID-50K" if count == _FULL else f"FID of {count} images, not FID-50K"
