"""A contact sheet of prepared samples: images decoded from the latents that a model is trained on, with saliency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.encode.codecs import frame_by_frame
from data_pipeline.read.shards import ShardSet
from sharpmoe.evaluation.held_out import spread
from sharpmoe.report.figures import GAP, Pixels, load_font, to_pixels, wrap

_SIDE = 132  # pixels of a picture's longer side
_TEXT, _SMALL = 12, 10  # font sizes
_BETWEEN = 4  # pixels
_LINES = 3  # of a caption
_FRAMES = 8  # at most, of a clip


class SampleCard(NamedTuple):
    """One sample of the sheet: an image, or some frames of a clip."""

    frames: list[Pixels]
    saliency: np.ndarray  # (T, h, w) in [0, 1], T = 1 for an image
    caption: str
    note: str  # largest saliency, class, key


def sample_cards(shards: ShardSet, count: int) -> list[SampleCard]:
    """Return decoded samples, evenly spread over a split. Raises DataError where one is damaged."""
    codec = shards.codec_object()
    found = []
    for index in spread(shards.num_samples, count):
        batch, bucket = shards.batch([index]), shards.buckets[shards.bucket_of(index)]
        label = int(batch.label[0])
        saliency = batch.saliency[0].reshape(bucket.frames, *bucket.grid[-2:]).numpy()
        known = [] if label < 0 else [f"class {label}"]
        note = " · ".join([f"M to {saliency.max():.2f}", *known, batch.keys[0]])
        images = frame_by_frame(codec.decode, batch.latent)
        frames = to_pixels(images if bucket.frames == 1 else images[0].transpose(0, 1))
        shown = spread(bucket.frames, _FRAMES)
        found.append(SampleCard([frames[at] for at in shown], saliency[shown], batch.captions[0], note))
    return found


def contact_sheet(samples: Sequence[SampleCard], title: str, columns: int | None = None) -> Pixels:
    """Draw the samples (H, W, 3) uint8: image and saliency M side by side, caption and note below.

    M is drawn over the grey image, scaled to the largest value of the image, which the note gives. Of a clip the frames
    are drawn beside each other, with the saliency of each below it.
    """
    shown = max(len(card.frames) for card in samples)
    columns = min(columns or max(2, round(math.sqrt(len(samples) * 0.8) / math.sqrt(shown))), len(samples))
    font, small = load_font(_TEXT), load_font(_SMALL)
    across, down = (2, 1) if shown == 1 else (shown, 2)
    wide, high = (count * (_SIDE + _BETWEEN) - _BETWEEN for count in (across, down))
    captions = [wrap(card.caption, wide, font, _LINES) or ["(empty caption)"] for card in samples]
    rows = [range(start, min(start + columns, len(samples))) for start in range(0, len(samples), columns)]
    heights = [high + 8 + max(len(captions[i]) for i in row) * (_TEXT + 4) + _SMALL + 8 for row in rows]
    top = GAP + _TEXT + 10
    size = (columns * (wide + 2 * GAP), top + sum(heights) + GAP * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), wrap(title, size[0] - 2 * GAP, font, 1)[0], fill="#222222", font=font)
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = GAP + column * (wide + 2 * GAP)
            _draw(sheet, pen, samples[i], captions[i], (left, top), (font, small))
        top += height + GAP
    return np.asarray(sheet)


def _draw(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    card: SampleCard,
    caption: Sequence[str],
    at: tuple[int, int],
    fonts: tuple[ImageFont.FreeTypeFont, ImageFont.FreeTypeFont],
) -> None:
    left, top = at
    heat = card.saliency / max(float(card.saliency.max()), 1e-6)
    maps = [_overlay(frame, each) for frame, each in zip(card.frames, heat, strict=True)]
    is_clip = len(card.frames) > 1
    for number, pixels in enumerate([*card.frames, *maps]):
        picture = _fitted(pixels)
        column, row = (number % len(maps), number // len(maps)) if is_clip else (number, 0)
        x, y = left + column * (_SIDE + _BETWEEN), top + row * (_SIDE + _BETWEEN)
        pen.rectangle((x, y, x + _SIDE - 1, y + _SIDE - 1), fill="#f2f2f2")
        sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
    wide = max(2, len(maps) if is_clip else 2) * (_SIDE + _BETWEEN) - _BETWEEN
    y = top + (2 if is_clip else 1) * (_SIDE + _BETWEEN) - _BETWEEN + 5
    for line in caption:
        pen.text((left, y), line, fill="#222222", font=fonts[0])
        y += _TEXT + 4
    (note,) = wrap(card.note, wide - _BETWEEN, fonts[1], 1)
    pen.text((left, y), note, fill="#888888", font=fonts[1])


def _overlay(picture: Pixels, levels: np.ndarray) -> Pixels:
    """Draw levels (h, w) in [0, 1] over the grey picture: every token in the colour of its value, 1 the brightest."""
    height, width = picture.shape[:2]
    heat = matplotlib.colormaps["magma"](levels)[..., :3]
    large = np.asarray(Image.fromarray((heat * 255).astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
    grey = picture.mean(-1, keepdims=True)
    return (0.7 * large + 0.3 * grey).round().astype(np.uint8)


def _fitted(pixels: Pixels) -> Image.Image:
    """Scale a picture so that its longer side has _SIDE pixels."""
    image = Image.fromarray(pixels)
    scale = _SIDE / max(image.size)
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)
