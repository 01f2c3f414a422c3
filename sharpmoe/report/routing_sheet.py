"""The routing sheet of a model: experts per token at each denoising step, on held-out images."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data_pipeline.encode.codecs import Codec, frame_by_frame
from data_pipeline.read.shards import ShardSet
from sharpmoe.durable import write_atomically
from sharpmoe.errors import DataError
from sharpmoe.evaluation.allocation import ALLOCATION_TIMES
from sharpmoe.evaluation.held_out import ALONE, Share, observe, spread
from sharpmoe.model.backbone import Backbone
from sharpmoe.report.figures import Pixels, drawable, render_figure, to_pixels, write_title

_HEAT = "magma"  # dark: no experts
_SIGNED_HEAT = "RdBu_r"  # blue: fewer experts than before, red: more
_MAPS = ("saliency", "foreground", "experts")  # fields of a sheet by token


@dataclass(frozen=True, kw_only=True)
class RoutingSheet:
    """Content of a routing sheet: I images of one resolution, or frames of clips, T denoising steps, N tokens."""

    images: Tensor  # (I, 3, H, W) in [-1, 1]
    saliency: Tensor  # (I, N)
    foreground: Tensor  # (I, N), NaN where the image has no mask
    experts: Tensor  # (I, T, N) experts that took each token, summed over MoE layers
    times: tuple[float, ...]  # (T), descending
    captions: tuple[str, ...]  # (I)

    def save(self, path: Path | str) -> Path:
        """Write the content as .npz, creating its folder: images as uint8, maps in half precision; return the path."""
        path = Path(path)
        halves = {name: getattr(self, name).cpu().numpy().astype(np.float16) for name in _MAPS}
        words = np.frombuffer(json.dumps({"times": self.times, "captions": self.captions}).encode(), np.uint8)

        def write(draft: Path) -> None:
            with draft.open("wb") as file:
                np.savez_compressed(file, images=np.stack(to_pixels(self.images)), words=words, **halves)

        write_atomically(path, write)
        return path

    @classmethod
    def load(cls, path: Path | str) -> RoutingSheet:
        """Read a file of `save`. Raises DataError where it is missing or holds something else."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                words = json.loads(stored["words"].tobytes())
                pixels = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2)
                maps = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in _MAPS}
            return cls(
                images=pixels / 127.5 - 1,
                **maps,
                times=tuple(map(float, words["times"])),
                captions=tuple(map(str, words["captions"])),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not the content of a routing sheet ({error})") from None


def observe_routing(
    model: Backbone,
    shards: ShardSet,
    codec: Codec,
    images: int = 8,
    seed: int = 0,
    share: Share = ALONE,
    layers: slice = slice(None),
) -> RoutingSheet:
    """Roll the model out over `images` held-out samples, spread over the main bucket, and return their routing.

    Of clips a sheet has a row per frame, evenly spread, and as many rows as of images: of one clip, or of more where
    they are shorter. Eval mode, fixed noise, one call per time for all images. `layers`: MoE layers in depth order.
    Communicates only through `share.reduce`.
    """
    rows, frames = shards.indices_of(shards.main_bucket), shards.buckets[shards.main_bucket].frames
    indices = [rows[i] for i in spread(len(rows), max(1, images // frames))]
    (seen,) = observe(
        model, shards, indices, ALLOCATION_TIMES, seed=seed, chunk=len(indices), share=share, layers=layers
    ).tokens
    batch = shards.batch(indices)
    sheet = RoutingSheet(
        images=frame_by_frame(codec.decode, batch.latent),
        saliency=seen.saliency,
        foreground=seen.foreground,
        experts=seen.experts,
        times=ALLOCATION_TIMES,
        captions=batch.captions,
    )
    return sheet if frames == 1 else _by_frame(sheet, frames, spread(frames, images))


def _by_frame(sheet: RoutingSheet, frames: int, shown: list[int]) -> RoutingSheet:
    """Return the sheet of some frames of clips (I, 3, T, H, W), each as an image with its tokens."""

    def cut(values: Tensor) -> Tensor:
        """Cut (I, ..., N) into (I F, ..., N / T)."""
        by_frame = values.unflatten(-1, (frames, -1))[..., shown, :].movedim(-2, 1)
        return by_frame.flatten(0, 1)

    return RoutingSheet(
        images=sheet.images[:, :, shown].transpose(1, 2).flatten(0, 1),
        saliency=cut(sheet.saliency),
        foreground=cut(sheet.foreground),
        experts=cut(sheet.experts),
        times=sheet.times,
        captions=tuple(f"{at + 1}/{frames}: {caption}" for caption in sheet.captions for at in shown),
    )


def draw_routing_sheet(
    sheet: RoutingSheet, title: str = "", most: float | None = None, label: str = "experts per token, all MoE layers"
) -> Pixels:
    """Draw one row per image: image, M, foreground mask, then experts per token of every denoising step.

    All steps share one colour scale from 0 to `most` (default: the largest count), so rows and steps can be compared.
    M is scaled to the largest value of its image.
    """
    most = most or max(float(sheet.experts.max()), 1.0)
    scale = _Scale(_HEAT, 0, most, label)
    return _draw_steps(sheet, sheet.experts, title, scale)


def draw_difference_sheet(before: RoutingSheet, after: RoutingSheet, title: str = "", most: float = 0) -> Pixels:
    """Draw what one model spends more (red) or less (blue) than another on the same images, at every denoising step.

    The layout is that of `draw_routing_sheet`; the colour scale is symmetric and ends at `most` (default: the largest
    difference).
    """
    change = after.experts - before.experts
    most = most or max(float(change.abs().max()), 1e-6)
    return _draw_steps(after, change, title, _Scale(_SIGNED_HEAT, -most, most, "change of experts per token"))


class _Scale(NamedTuple):
    """Colours of the maps."""

    heat: str
    low: float
    high: float
    label: str


def _draw_steps(sheet: RoutingSheet, values: Tensor, title: str, scale: _Scale) -> Pixels:
    """Draw image, M and mask (where there are any) of every row, then the values (I, T, N) of every denoising step."""
    num_images, num_steps, _ = values.shape
    has_masks = not bool(sheet.foreground.isnan().all())
    first = 3 if has_masks else 2  # column of the first step
    columns = first + num_steps
    height, width = sheet.images.shape[2:]
    row_height = 0.25 + 0.95 * min(max(height / width, 0.4), 1.6)  # a picture is one inch wide, or narrower
    figure = Figure(figsize=(1.02 * columns + 0.9, row_height * num_images + 0.55 + 0.3 * bool(title)), dpi=110)
    axes = figure.subplots(num_images, columns, squeeze=False)
    heads = ["image", "saliency M", *(["mask"] if has_masks else []), *(f"t = {t:.3g}" for t in sheet.times)]
    for row, pixels in zip(range(num_images), to_pixels(sheet.images), strict=True):
        grids = [to_grid(each, sheet) for each in (sheet.saliency[row], sheet.foreground[row], *values[row])]
        axes[row, 0].imshow(pixels)
        for axis, grid, top in zip(axes[row, 1:first], grids, (float(grids[0].max()), 1.0), strict=False):
            axis.imshow(grid, interpolation="nearest", cmap="gray", vmin=0, vmax=top)
        for axis, grid in zip(axes[row, first:], grids[2:], strict=True):
            drawn = axis.imshow(grid, interpolation="nearest", cmap=scale.heat, vmin=scale.low, vmax=scale.high)
        if has_masks and np.isnan(grids[1]).any():
            axes[row, 2].text(0.5, 0.5, "none", ha="center", va="center", transform=axes[row, 2].transAxes, fontsize=8)
        write_caption(axes[row, 0], sheet.captions[row])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=8.5)
    figure.subplots_adjust(
        left=0.01, right=0.93, top=_top(figure, title), bottom=0.2 / figure.get_figheight(), wspace=0.06
    )
    if title:
        write_title(figure, title)
    bar = figure.add_axes((0.942, 0.3, 0.009, 0.4))
    figure.colorbar(drawn, cax=bar).set_label(scale.label, fontsize=8)
    bar.tick_params(labelsize=7)
    return render_figure(figure)


def to_grid(values: Tensor, sheet: RoutingSheet) -> np.ndarray:
    """Arrange one value per token (N,) as tokens lie in the image: (h, w) float32."""
    height, width = sheet.images.shape[2:]
    rows = round(math.sqrt(values.numel() * height / width))  # tokens are square in the picture, whatever its aspect
    return values.reshape(rows, -1).float().cpu().numpy()


def write_caption(axis: Axes, caption: str) -> None:
    """Write a caption below the first picture of a row, shortened to one line."""
    axis.set_xlabel(_short(drawable(caption), 48), fontsize=7.5, labelpad=3, loc="left", parse_math=False)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _top(figure: Figure, title: str) -> float:
    return 1 - (0.3 + 0.3 * bool(title)) / figure.get_figheight()
