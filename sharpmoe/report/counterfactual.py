"""Counterfactual routing at sampling: the same noise with the saliency routers on, off, and guided by another image.

What the three differ in is caused by what the saliency routers read, and by nothing else. Differences of routing at a
step include those of x_t, which has moved apart since the first step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from sharpmoe import sampling
from sharpmoe.config import SampleConfig
from sharpmoe.durable import write_atomically
from sharpmoe.errors import ConfigError
from sharpmoe.flow import TIME_RANGES
from sharpmoe.model.backbone import Backbone
from sharpmoe.report.figures import Pixels, drawable, render_figure, save_png, to_pixels, write_title
from sharpmoe.report.sampled_routing import SampledRouting
from sharpmoe.report.samples import draw_images

_VARIANTS: dict[str, sampling.SaliencyInput] = {"on": "own", "off": "off", "swapped": "swapped"}
_DIFFERENCE = 0.5  # colours of a difference of pixels end here; black to white is 2
_MAX_STEPS = 16  # at which routing is compared, evenly spread
_DEFAULT = sampling.SamplingOptions()


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """One way of sampling I images: T compared steps, L MoE layers, N tokens."""

    images: Tensor  # (I, 3, H, W) in [-1, 1]
    chosen: Tensor  # (T, L, I, N, E) bool
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class VariantChange:
    """How one variant differs from sampling with the saliency routers on; means over images."""

    pixels: float  # root mean square, of a range of 2
    choices: dict[str, float]  # by range of t: share of the choices (token, expert) of either that the other lacks
    experts: float  # experts per token and layer
    experts_on: float


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """The variants and how they differ."""

    images: dict[str, Tensor]  # (I, 3, H, W) by variant
    experts: dict[str, Tensor]  # (I, N) experts per token and layer, mean over the compared steps, by variant
    changes: dict[str, VariantChange]  # of "off" and "swapped"


def draw_counterfactual(
    model: Backbone,
    request: sampling.Request,
    settings: SampleConfig,
    decode: Callable[[Tensor], Tensor],
    options: sampling.SamplingOptions = _DEFAULT,
) -> Counterfactual:
    """Draw the images three times from the same noise; `options` but the callback and what the routers read.

    All images are one batch: swapped, an image is guided by the x0_hat of the one before it. Raises ConfigError where
    there is one image only, or more than a batch, or a model without saliency routers.
    """
    if not (model.config.saliency_router and model.moe_layers()):
        raise ConfigError(
            "--counterfactual turns the saliency routers off, but the model has none; use post-trained ones"
        )
    if not 2 <= len(request.indices) <= options.batch_size:
        raise ConfigError(
            f"--counterfactual swaps what the routers read between 2 to --batch-size ({options.batch_size}) images, "
            f"got {len(request.indices)}; give more captions, or a larger --batch-size"
        )
    found = {}
    compared = {round(i * (settings.num_steps - 1) / (_MAX_STEPS - 1)) for i in range(_MAX_STEPS)}
    for name, saliency in _VARIANTS.items():
        kept = SampledRouting(compared, with_choices=True)
        images = draw_images(model, request, settings, decode, replace(options, callback=kept, saliency=saliency))
        found[name] = _Variant(images=images, chosen=kept.choices(), times=kept.times)
    return Counterfactual(
        images={name: each.images for name, each in found.items()},
        experts={name: each.chosen.sum(-1).float().mean((0, 1)) for name, each in found.items()},
        changes={name: _change(found["on"], each) for name, each in found.items() if name != "on"},
    )


def _change(on: _Variant, other: _Variant) -> VariantChange:
    choices = {}
    for name, (lower, upper) in {**TIME_RANGES, "all t": (0.0, 1.0)}.items():
        steps = [k for k, t in enumerate(on.times) if lower < t <= upper]
        a, b = on.chosen[steps], other.chosen[steps]
        either = (a | b).sum((0, 1, 3, 4))
        choices[name] = float(((a ^ b).sum((0, 1, 3, 4)) / either.clamp(min=1)).mean()) if steps else math.nan
    return VariantChange(
        pixels=float((on.images - other.images).square().flatten(1).mean(1).sqrt().mean()),
        choices=choices,
        experts=float(other.chosen.sum(-1).float().mean()),
        experts_on=float(on.chosen.sum(-1).float().mean()),
    )


def counterfactual_table(found: Counterfactual) -> str:
    """Return a table: how samples and routing differ from those with the saliency routers on."""
    ranges = list(next(iter(found.changes.values())).choices)
    lines = [
        "compared with the saliency routers on, same noise (means over images):",
        f"{'saliency routers':<18}{'pixels, RMS of 2':>18}{'experts per token':>19}  share of choices that differ: "
        + "  ".join(f"{name:>12}" for name in ranges),
    ]
    on = next(iter(found.changes.values())).experts_on
    lines.append(f"{'on':<18}{'':>18}{on:>19.3f}")
    for name, change in found.changes.items():
        shares = "  ".join(f"{'-' if math.isnan(x) else f'{x:.1%}':>12}" for x in change.choices.values())
        lines.append(f"{name:<18}{change.pixels:>18.4f}{change.experts:>19.3f}  {'':<29} {shares}")
    return "\n".join(lines)


def draw_counterfactual_grid(found: Counterfactual, titles: Sequence[str], title: str = "") -> Pixels:
    """Draw one row per image: it with the routers on, off and swapped, what changed, and the experts per token of each.

    Changes of pixels and maps of experts have one scale each.
    """
    names, count = list(found.images), len(titles)
    others = [name for name in names if name != "on"]
    heads = [*names, *(f"|{name} - on|" for name in others), *(f"experts, {name}" for name in names)]
    height, width = found.images["on"].shape[2:]
    cell = min(max(height / width, 0.4), 1.6)
    figure = Figure(figsize=(1.25 * len(heads) + 1.6, (1.25 * cell + 0.25) * count + 0.85), dpi=110)
    axes = figure.subplots(count, len(heads), squeeze=False)
    pictures = {name: to_pixels(images) for name, images in found.images.items()}
    most = max(float(each.max()) for each in found.experts.values())
    least = min(float(each.min()) for each in found.experts.values())
    for row in range(count):
        columns = iter(axes[row])
        for name in names:
            next(columns).imshow(pictures[name][row])
        for name in others:
            change = (found.images[name][row] - found.images["on"][row]).abs().mean(0)
            shown = next(columns).imshow(change.numpy(), cmap="magma", vmin=0, vmax=_DIFFERENCE)
        for name in names:
            values = found.experts[name][row]
            grid = values.reshape(round(math.sqrt(values.numel() * height / width)), -1).numpy()
            drawn = next(columns).imshow(grid, interpolation="nearest", cmap="magma", vmin=least, vmax=most)
        axes[row, 0].set_xlabel(drawable(titles[row])[:70], fontsize=7.5, loc="left", parse_math=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=8.5)
    inches = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.9, top=1 - 0.65 / inches, bottom=0.25 / inches, wspace=0.05, hspace=0.2)
    write_title(figure, f"{title}: saliency routers on, off, guided by the image before")
    for place, (mapped, label) in enumerate(
        ((shown, "change of pixels, of 2"), (drawn, "experts per token and layer"))
    ):
        bar = figure.add_axes((0.915, 0.55 - 0.4 * place, 0.009, 0.3))
        figure.colorbar(mapped, cax=bar).set_label(label, fontsize=7.5)
        bar.tick_params(labelsize=7)
    return render_figure(figure)


def write_counterfactual(folder: Path, found: Counterfactual, titles: Sequence[str], title: str, seed: int) -> Path:
    """Write counterfactual.png and counterfactual.json; return the picture. Raises OSError."""
    changes = {
        name: {
            "pixels_rms": each.pixels,
            "experts_per_token": each.experts,
            "experts_per_token_on": each.experts_on,
            "share_of_choices": {key: None if math.isnan(x) else x for key, x in each.choices.items()},
        }
        for name, each in found.changes.items()
    }
    content = {"weights": title, "seed": seed, "captions": list(titles), "changes": changes}
    write_atomically(folder / "counterfactual.json", json.dumps(content, indent=1) + "\n")
    return save_png(draw_counterfactual_grid(found, titles, title), folder / "counterfactual.png")
