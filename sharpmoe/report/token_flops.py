"""Where a token's FLOPs went: attention, dense MLPs, experts and routers, by token and by saliency.

All tokens of a call cost the same but for the experts that took them, so a map of FLOPs is that of the experts with the
rest added.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from sharpmoe.config import ModelConfig
from sharpmoe.durable import write_atomically
from sharpmoe.model.flops import Call, products
from sharpmoe.report.figures import Pixels, render_figure, save_png, to_pixels, write_title
from sharpmoe.report.routing_sheet import RoutingSheet, to_grid, write_caption

_FIFTHS = 5
_LABELS = {
    "attention": "attention",
    "mlp": "dense and shared MLPs",
    "other": "embedders, modulation, output",
    "router": "routers",
}
_EXPERTS = "experts"
_COLOURS = ("#4c72b0", "#8da0cb", "#bbbbbb", "#55a868", "#dd8452")


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Matrix products (model/flops.py) of one token in one call of the model in inference, in FLOPs."""

    attention: float  # to image and text, with its projections
    mlp: float  # dense MLPs and shared experts
    other: float  # embedders, modulation, final layer: what is computed once per image is divided by its tokens
    router: float  # gates, saliency routers, capacity predictors
    per_expert: float  # of one expert that takes the token

    @classmethod
    def of(cls, config: ModelConfig, tokens: int, text_tokens: int) -> TokenFlops:
        """Count the products of one image of `tokens` tokens with a caption of `text_tokens`, padding included."""
        uses_x0_prev = config.saliency_router and config.num_moe_layers > 0
        text = text_tokens if config.conditioning == "text" else 0
        call = Call(tokens=tokens, rows=1, text_tokens=text, uses_x0_prev=uses_x0_prev, training=False)
        sums = {"attention": 0.0, "mlp": 0.0, "other": 0.0, "router": 0.0, "routed": 0.0}
        for product in products(config, call):
            sums[product.use if product.part == "dense" else product.part] += product.forward
        shared = {use: sums[use] / tokens for use in _LABELS}
        return cls(**shared, per_expert=sums["routed"])

    @property
    def shared(self) -> float:
        """What every token costs, whatever its experts."""
        return self.attention + self.mlp + self.other + self.router


def flops_by_saliency(flops: TokenFlops, sheet: RoutingSheet) -> list[float]:
    """Return the FLOPs of experts per token and step, by fifth of the tokens of an image, least salient first.

    Means over images and denoising steps; tokens of equal saliency are in the order of the image.
    """
    rows = sheet.experts.float().mean(1)  # (I, N)
    ordered = rows.gather(1, sheet.saliency.argsort(dim=1, stable=True))
    parts = ordered.tensor_split(_FIFTHS, dim=1)
    return [float(part.mean()) * flops.per_expert for part in parts]


def draw_token_flops(flops: TokenFlops, sheet: RoutingSheet, title: str = "", images: int = 4) -> Pixels:
    """Draw image, saliency and MFLOPs per token of at most `images` images, beside what they are spent on by saliency.

    Maps are means over the denoising steps, on one scale.
    """
    count = min(images, len(sheet.captions))
    maps = (sheet.experts[:count].float().mean(1) * flops.per_expert + flops.shared) / 1e6
    height = max(1.25 * count + 0.8, 3.4)
    figure = Figure(figsize=(9.6, height), dpi=110)
    axes = figure.subplots(count, 3, squeeze=False)
    for row, pixels in zip(range(count), to_pixels(sheet.images), strict=False):
        axes[row, 0].imshow(pixels)
        axes[row, 1].imshow(to_grid(sheet.saliency[row], sheet), interpolation="nearest", cmap="gray", vmin=0)
        grid = to_grid(maps[row], sheet)
        drawn = axes[row, 2].imshow(
            grid, interpolation="nearest", cmap="magma", vmin=float(maps.min()), vmax=float(maps.max())
        )
        write_caption(axes[row, 0], sheet.captions[row])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, head in zip(axes[0], ("image", "saliency M", "MFLOPs per token"), strict=True):
        axis.set_title(head, fontsize=8.5)
    top = 1 - 0.62 / height
    figure.subplots_adjust(left=0.01, right=0.43, top=top, bottom=0.25 / height, wspace=0.06, hspace=0.3)
    bar = figure.add_axes((0.445, 0.25, 0.01, 0.5))
    figure.colorbar(drawn, cax=bar)
    bar.tick_params(labelsize=7)
    _draw_bars(figure.add_axes((0.56, 0.5 / height, 0.42, top - 0.5 / height)), flops, flops_by_saliency(flops, sheet))
    write_title(figure, f"{title}: FLOPs per token and model call")
    return render_figure(figure)


def _draw_bars(axis, flops: TokenFlops, experts: list[float]) -> None:  # type: ignore[no-untyped-def]
    """Stack what a token costs, by fifth of the tokens."""
    places, below = torch.arange(1, _FIFTHS + 1), torch.zeros(_FIFTHS)
    parts: list[tuple[str, Tensor]] = [
        (label, torch.full((_FIFTHS,), getattr(flops, use) / 1e6)) for use, label in _LABELS.items()
    ]
    parts.append((_EXPERTS, torch.tensor(experts) / 1e6))
    for (label, values), colour in zip(parts, _COLOURS, strict=True):
        axis.bar(places, values, 0.7, bottom=below, label=label, color=colour)
        below = below + values
    for place, total in zip(places.tolist(), below.tolist(), strict=True):
        axis.text(place, total, f"{total:.3g}", ha="center", va="bottom", fontsize=7.5)
    axis.set_ylim(0, float(below.max()) * 1.42)
    axis.set_xlabel("fifth of the tokens, least to most salient", fontsize=8.5)
    axis.set_ylabel("MFLOPs per token", fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper left")


def write_token_flops(folder: Path, name: str, flops: TokenFlops, sheet: RoutingSheet, title: str) -> Path:
    """Write NAME.png and NAME.json, the FLOPs of a token by use; return the picture. Raises OSError."""
    content = {
        "weights": title,
        "flops_per_token": asdict(flops),
        "experts_by_saliency_fifth": flops_by_saliency(flops, sheet),
        "images": len(sheet.captions),
        "times": list(sheet.times),
    }
    write_atomically(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    return save_png(draw_token_flops(flops, sheet, title), folder / f"{name}.png")
