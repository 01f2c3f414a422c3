"""Draw images for captions or class labels and write them to files."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageSequence
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.encode.codecs import Codec, frame_by_frame
from data_pipeline.encode.like import OriginCoders, is_fitted, keeps_codec, origin_in, same_fit
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.index import MAX_TOKENS
from data_pipeline.read.shards import ShardSet
from sharpmoe import sampling
from sharpmoe.config import DataConfig, ModelConfig, SampleConfig
from sharpmoe.config_io import section_error
from sharpmoe.console import print_note
from sharpmoe.durable import check_folder
from sharpmoe.errors import ConfigError, DataError
from sharpmoe.evaluation.held_out import evaluating
from sharpmoe.model.backbone import Backbone, ClassCondition, TextCondition
from sharpmoe.report import figures
from sharpmoe.report.runs import SavedModel
from sharpmoe.train.shapes import shape_mismatch

_MOST_SQUARES = 64  # times the tokens of a model's square: far beyond, positions say nothing and a step takes minutes


class Prompts(NamedTuple):
    """What to draw: captions for a text-conditional model, or class labels; one image each."""

    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    @classmethod
    def of(cls, prompts: Sequence[str | int], config: ModelConfig) -> Prompts:
        """Return captions and labels by their types. Raises ConfigError for those that the model does not take."""
        captions = tuple(each for each in prompts if isinstance(each, str))
        labels = tuple(int(each) for each in prompts if not isinstance(each, str))
        found = cls(captions, labels)
        found.check(config)
        return found

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where a model does not take these prompts."""
        if config.conditioning == "class":
            if not self.labels:
                raise ConfigError("the model is class-conditional: give --labels, not captions")
            for label in self.labels:
                if not 0 <= label < config.num_classes:
                    raise ConfigError(f"label {label}, the model has classes 0 to {config.num_classes - 1}")
            return
        if self.labels:
            raise ConfigError(f"the model is text-conditional, got label {self.labels[0]}; give captions")
        if not self.captions:
            raise ConfigError(
                "no captions to draw: give --captions, --captions-file, or sample.captions in the run file"
            )
        for number, caption in enumerate(self.captions, 1):
            if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise ConfigError(f"caption {number} is {caption!r}: not UTF-8 text; write it again")

    def titles(self) -> tuple[str, ...]:
        """Return the text below each image."""
        return self.captions or tuple(f"class {label}" for label in self.labels)


def check_shards(model: ModelConfig, shards: ShardSet, header: Mapping[str, str] | None = None) -> None:
    """Raise DataError where a model does not fit the codec or the text encoder of the shards.

    header: of the model's weights, which says with which ones it was trained; without it shapes alone are compared.
    """
    wrong = shape_mismatch(shards, model, any_size=True)
    if wrong is not None:
        raise DataError(
            f"{shards.location}: made for model.{wrong.key} {wrong.data}, the model has {wrong.model}; name the shards "
            "the model was trained on (--shards)"
        )
    differs = other_origin(header or {}, shards)
    if differs is not None:
        raise DataError(
            f"{shards.location}: made with {differs.what} {differs.key} {differs.there!r}, the model was trained with "
            f"{differs.here!r}; name the shards the model was trained on (--shards)"
        )


class OriginDifference(NamedTuple):
    """The first key in which a codec or text encoder is another than that of a model."""

    what: str  # codec | encoder
    key: str
    there: Any
    here: Any  # of the model


def other_origin(own: Mapping[str, str], other: ShardSet | Mapping[str, str]) -> OriginDifference | None:
    """Compare the codec and text encoder that a model was trained with to those of shards, or of other weights.

    own, other: headers of weights. What a header does not say is not compared. Two fits that differ by rounding are one
    codec, weights of one hash are one model whatever their folder is called, and texts may be cut at other lengths.
    """
    if isinstance(other, Mapping):
        theirs, kept, coders = other, other, lambda: OriginCoders(own).codec_object()
    else:
        theirs, kept, coders = _identities(other), own, other.codec_object
    for what, keys in (("codec", None), ("encoder", ("kind", "sha256"))):
        if what not in own or what not in theirs:
            continue
        here, there = json.loads(own[what]), json.loads(theirs[what])
        differ = [key for key in keys or sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        if differ == ["name"] and "sha256" in here:
            differ = []
        if differ == ["sha256"] and is_fitted(here) and keeps_codec(own):
            differ = [] if same_fit(kept, coders()) else differ
        if differ:
            return OriginDifference(what, differ[0], there.get(differ[0]), here.get(differ[0]))
    return None


def _identities(shards: ShardSet) -> dict[str, str]:
    return {"codec": json.dumps(shards.codec), "encoder": json.dumps(shards.encoder)}


def open_coders(
    saved: SavedModel, model: Backbone, header: Mapping[str, str], shards: str | None = None
) -> ShardSet | OriginCoders:
    """Return what decodes latents and encodes captions of a model: `shards`, else those of its run, else its weights.

    `header`: of the weights. A file outside a run needs no shards where it keeps its codec, nor does a run whose shards
    are elsewhere. Raises DataError where there are none, or where they are not for this model.
    """
    data, own = saved.run.data if saved.run else DataConfig(), origin_in(header)
    if shards is None and keeps_codec(own):
        where = str(saved.weights)
        if saved.run is None:
            return OriginCoders(own, where)
        try:
            found = ShardSet.open(data.first_place, data.train_split, data.remote.options())
        except DataError as error:
            print_note(f"note: {error}; codec and text encoder are those that {where} names")
            return OriginCoders(own, where)
    else:
        found = ShardSet.open(shards or data.first_place, data.train_split, data.remote.options())
    check_shards(model.config, found, own)
    return found


def check_weak_origin(weak: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise ConfigError where a weak model was trained on latents of another codec, or texts of another encoder.

    weak, own: headers of the weights of the weak model and of the model; see `other_origin`.
    """
    differs = other_origin(own, weak)
    if differs is not None:
        raise ConfigError(
            f"weak model: trained with {differs.what} {differs.key} {differs.there!r}, the model with {differs.here!r}"
            "; take weights of the same data, such as the base of the model"
        )


class Size(NamedTuple):
    """Pixels of images to draw; None: of the model's square."""

    height: int | None = None
    width: int | None = None

    def of_latents(self, config: ModelConfig, codec: Codec) -> tuple[int, int]:
        """Return (h, w) of the latents.

        Raises ConfigError where a side is no multiple of the pixels of a token, or the image has too many tokens.
        """
        factor = pixels_per_latent(codec)
        step = factor * config.patch_size
        for name, side in self._asdict().items():
            if side is not None and (side < 1 or side % step):
                raise ConfigError(
                    f"{name} {side}: not a multiple of {step} (pixels of a token: codec {factor} x patch "
                    f"{config.patch_size}); take {max(round(side / step), 1) * step}"
                )
        rows, columns = (config.latent_size if side is None else side // factor for side in self)
        tokens = math.prod(config.shape_of_latent((rows, columns))[1:]) // config.patch_size**2
        most = min(MAX_TOKENS, _MOST_SQUARES * config.num_tokens)
        if tokens > most:
            clip = f", {config.latent_frames} frames" if config.latent_frames > 1 else ""
            raise ConfigError(
                f"{rows * factor} x {columns * factor} pixels (H x W){clip}: {tokens} tokens, at most {most} (the "
                f"model's square has {config.num_tokens}); lower --height and --width"
            )
        return rows, columns


def pixels_per_latent(codec: Codec) -> int:
    """Return the pixels of one element of a latent, each way: the side of the smallest image that the codec takes."""
    for side in itertools.count(1):
        with suppress(DataError):
            return side // codec.latent_shape(side)[1]
    raise AssertionError


def unknown_size(latents: tuple[int, int], shards: ShardSet | OriginCoders) -> str:
    """Return a note where images of such latents (h, w) are of no size of the shards, else "".

    A model has not seen the positions of tokens beyond the sizes that it was trained on (docs/design/0011). Weights
    do not say which sizes these are.
    """
    if isinstance(shards, OriginCoders) or any(bucket.latent[-2:] == latents for bucket in shards.buckets.values()):
        return ""
    sizes = ", ".join(shards.buckets)
    return (
        f"the shards have {sizes} (H x W pixels): in sizes that a model was not trained on, images may be worse, above "
        "all at their edges"
    )


def override_sampling(settings: SampleConfig, given: Mapping[str, object]) -> SampleConfig:
    """Replace fields of a sample section by those `given` that are not None, and keys of a section in it.

    Raises ConfigError for a bad value.
    """
    fields = settings.model_dump()
    for name, value in given.items():
        if value is not None:
            fields[name] = fields[name] | value if isinstance(value, dict) else value
    try:
        return SampleConfig(**fields)
    except ValidationError as error:
        raise ConfigError(section_error(error, "sample")) from None


class TextSource(Protocol):
    """What encodes captions for a model: prepared shards, or what its weights file names."""

    def text_encoder(self) -> TextEncoder: ...

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]: ...


def encode_prompts(
    config: ModelConfig, shards: TextSource, prompts: Prompts, device: torch.device | str = "cpu"
) -> sampling.Request:
    """Encode prompts with the text encoder of the shards, to `device`. Raises ConfigError as `Prompts.check`."""
    prompts.check(config)
    if config.conditioning == "class":
        cond = ClassCondition(torch.tensor(prompts.labels, device=device))
        empty = sampling.empty_condition(cond, config, None) if config.class_dropout else None
        return sampling.Request(cond, empty, tuple(range(len(prompts.labels))))
    text = TextCondition(*(part.to(device) for part in shards.text_encoder().encode(list(prompts.captions))))
    return sampling.Request(
        text, sampling.empty_condition(text, config, shards.empty_text()), tuple(range(len(prompts.captions)))
    )


def draw_images(
    model: Backbone,
    request: sampling.Request,
    settings: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    options: sampling.SamplingOptions | None = None,
) -> Tensor:
    """Sample and decode images (B, 3, H, W) in [-1, 1] on the CPU; restore the mode of the models.

    A model with frames draws clips (B, 3, T, H, W), which are decoded frame by frame.
    """
    options = options or sampling.SamplingOptions()
    with evaluating(model), nullcontext() if options.weak is None else evaluating(options.weak):
        latents = sampling.generate(model, model.config, settings, request, options)
    return frame_by_frame(decode, latents.cpu())


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How images are drawn to files."""

    part: sampling.ImagePart = field(default_factory=sampling.ImagePart)  # which of the images
    batch_size: int = 16  # images per model call
    pool_per_image: bool = False  # an image is a pool of DiffMoE, so that the batch size has no effect
    size: Size = field(default_factory=Size)
    weak: Backbone | None = None  # a model to guide away from, on the device of the other
    fps: float = 8.0  # frames of a clip that its file shows per second

    def of_latents(self, size: tuple[int, int]) -> sampling.SamplingOptions:
        """Return the options of sampling latents of a size (h, w)."""
        return sampling.SamplingOptions(
            batch_size=self.batch_size, pool_per_image=self.pool_per_image, size=size, weak=self.weak
        )


def draw_to_files(
    model: Backbone,
    shards: ShardSet | OriginCoders,
    prompts: Prompts,
    settings: SampleConfig,
    folder: Path | str,
    options: DrawOptions,
    note: Callable[[str], object] = print,
) -> Path | None:
    """Draw one PNG per prompt and a grid, which have the same numbers and names whatever the part.

    A clip is an animated WebP, and a row of the grid.
    The model is on its device already; `note` is called with what the user should know. Returns the grid, or None where
    the part has no images. Raises ConfigError where there are no prompts or a side is no multiple of the pixels of a
    token.
    """
    part, device, codec = options.part, next(model.parameters()).device, shards.codec_object()
    size = options.size.of_latents(model.config, codec)
    request = encode_prompts(model.config, shards, prompts, device)
    rows = part.rows(len(request.indices), options.batch_size)
    if not rows:
        return None
    check_folder(Path(folder))
    remark = unknown_size(size, shards)
    if remark:
        note(remark)
    images = draw_images(model, request.select(rows), settings, codec.decode, options.of_latents(size))
    folder, titles = Path(folder), prompts.titles()[rows.start : rows.stop]
    names = [f"{i:03}_{slug(title)}" for i, title in zip(rows, titles, strict=True)]
    grid = "grid" if part.of == 1 else f"grid_part{part.number}of{part.of}"
    pictures: dict[str, list[figures.Pixels]] = {}
    if images.ndim == 4:
        pictures |= {f"{name}.png": [pixels] for name, pixels in zip(names, figures.to_pixels(images), strict=True)}
    else:
        clips = zip(names, figures.clip_pixels(images), strict=True)
        pictures |= {f"{name}.webp": frames for name, frames in clips}
    pictures[f"{grid}.png"] = [figures.sample_grid(images, titles)]
    milliseconds = max(1, round(1000 / options.fps))
    number = _call_number(folder, pictures, milliseconds)
    for name, frames in pictures.items():
        place = _numbered(folder / name, number)
        if place.suffix == ".png":
            figures.save_png(frames[0], place)
        else:
            figures.save_animation(frames, place, milliseconds)
    return _numbered(folder / f"{grid}.png", number)


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def _call_number(folder: Path, pictures: Mapping[str, Sequence[figures.Pixels]], milliseconds: int) -> int:
    """Return what names get so that no other picture of an earlier call is lost: 1 is nothing, then _2, _3, ..."""
    for number in itertools.count(1):
        if all(_is_free(_numbered(folder / name, number), found, milliseconds) for name, found in pictures.items()):
            return number
    raise AssertionError


def _is_free(path: Path, frames: Sequence[figures.Pixels], milliseconds: int) -> bool:
    """Whether a picture can be written without a loss: there is none, or it is the same."""
    if not path.is_file():
        return True
    found: list[figures.Pixels] = []
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                pixels = np.asarray(frame.convert("RGB"))
                found += [pixels] * max(1, round(frame.info.get("duration", 0) / milliseconds))  # equal ones are one
    except OSError:
        return False
    return len(found) == len(frames) and all(map(np.array_equal, found, frames))


def parse_part(text: str) -> sampling.ImagePart:
    """Parse `3/8`, the third of eight parts. Raises ConfigError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text}: expected NUMBER/PARTS, such as 1/8 for the first of eight")
    return sampling.ImagePart(int(match[1]), int(match[2]))


def slug(text: str, length: int = 48) -> str:
    """Convert a caption to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "image"
