"""The film strip of sampling: what the saliency routers read at each step, beside the routing of that step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.model.backbone import Backbone
from sharpmoe.report.figures import Pixels, drawable, render_figure, save_png, to_pixels, write_title
from sharpmoe.report.sampled_routing import SampledRouting
from sharpmoe.report.samples import draw_images

_HEAT = "magma"  # dark: no experts; as on routing sheets
_DEFAULT = sampling.SamplingOptions()


@dataclass(frozen=True, kw_only=True)
class Film:
    """Chosen steps of sampling I images: T steps, N tokens."""

    times: tuple[float, ...]  # (T), descending
    seen: Tensor  # (T, I, 3, H, W) in [-1, 1]: the clean latents that the saliency routers read, decoded
    experts: Tensor  # (T, I, N) experts that took each token, summed over MoE layers
    images: Tensor  # (I, 3, H, W) what was drawn
    reads: bool  # whether the model has saliency routers; without them `seen` is what it predicted


def record_film(
    model: Backbone,
    request: sampling.Request,
    settings: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    frames: int,
    options: sampling.SamplingOptions = _DEFAULT,
) -> Film:
    """Draw images and keep `frames` steps, evenly spread from the first to the last.

    At step k the saliency routers read x0_hat of step k - 1, at the first the noise. The callback of
    `options` is not called. Raises ConfigError for a model without experts.
    """
    if not model.moe_layers():
        raise ConfigError("a film strip (--film) shows routing, but the model has no MoE layer; draw without it")
    count = settings.num_steps
    kept = SampledRouting(round(i * (count - 1) / max(frames - 1, 1)) for i in range(frames))
    images = draw_images(model, request, settings, decode, replace(options, callback=kept))
    experts = kept.experts()
    assert experts is not None
    return Film(
        times=kept.times,
        seen=torch.stack([decode(each) for each in kept.read()]),
        experts=experts,
        images=images,
        reads=model.config.saliency_router,
    )


def draw_film(film: Film, titles: Sequence[str], title: str = "") -> Pixels:
    """Draw two rows per image, what the routers read and the experts per token, a column per step, then the image.

    All maps share one colour scale from 0 to the largest count.
    """
    steps, images, _ = film.experts.shape
    height, width = film.images.shape[2:]
    cell = min(max(height / width, 0.4), 1.6)
    figure = Figure(figsize=(1.0 * (steps + 1) + 1.9, (2 * cell + 0.45) * images + 0.75), dpi=110)
    # An empty row below each image's two has room for its caption.
    axes = figure.subplots(3 * images, steps + 1, squeeze=False, height_ratios=[cell, cell, 0.25] * images)
    most = max(float(film.experts.max()), 1.0)
    finals = to_pixels(film.images)
    for row in range(images):
        above, below = axes[3 * row], axes[3 * row + 1]
        for column in range(steps):
            above[column].imshow(to_pixels(film.seen[column, row : row + 1])[0])
            grid = _grid(film.experts[column, row], height / width)
            drawn = below[column].imshow(grid, interpolation="nearest", cmap=_HEAT, vmin=0, vmax=most)
        above[-1].imshow(finals[row])
        below[-1].axis("off")
        above[0].set_ylabel("read" if film.reads else "x0_hat", fontsize=8)
        below[0].set_ylabel("experts", fontsize=8)
        below[0].set_xlabel(drawable(titles[row])[:90], fontsize=7.5, loc="left", parse_math=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis in axes[2::3].flat:
        axis.axis("off")
    for axis, t in zip(axes[0], film.times, strict=False):
        axis.set_title(f"t = {t:.3g}", fontsize=8.5)
    axes[0, -1].set_title("drawn", fontsize=8.5)
    inches = figure.get_figheight()
    figure.subplots_adjust(left=0.03, right=0.91, top=1 - 0.6 / inches, bottom=0.05 / inches, wspace=0.05, hspace=0.05)
    read = "what the saliency routers read" if film.reads else "what the model predicted (it has no saliency routers)"
    write_title(figure, f"{title}: {read}, and experts per token")
    bar = figure.add_axes((0.925, 0.3, 0.009, 0.4))
    figure.colorbar(drawn, cax=bar).set_label("experts per token, all MoE layers", fontsize=8)
    bar.tick_params(labelsize=7)
    return render_figure(figure)


def write_film(folder: Path, film: Film, titles: Sequence[str], title: str, seed: int) -> Path:
    """Write film.png, and film.json with the experts of every token; return the picture. Raises OSError."""
    content = {
        "weights": title,
        "seed": seed,
        "captions": list(titles),
        "times": list(film.times),
        "experts_per_token": film.experts.tolist(),  # [step][image][token]
    }
    write_atomically(folder / "film.json", json.dumps(content) + "\n")
    return save_png(draw_film(film, titles, title), folder / "film.png")


def _grid(values: Tensor, aspect: float) -> np.ndarray:
    """Arrange one value per token (N,) as tokens lie in an image of this height over width."""
    rows = round(math.sqrt(values.numel() * aspect))
    return values.reshape(rows, -1).float().numpy()
