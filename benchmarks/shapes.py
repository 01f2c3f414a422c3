"""Drawn shapes as prepared shards, by the code that prepares the shipped data: real data without a download."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.write import Machine, prepare_shards
from data_pipeline.sources.items import Item, Place, Skipped, Unit, hash_text

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "orange", "purple")
QUIET = Machine(progress=False)
_UNIT = 10  # pictures


class ShapesSource:
    """Drawn shapes on a transparent ground; every sixth one is in split `unseen`, the label is the shape.

    `sides`: (H, W) of the pictures in turn, in parts of `draw_size`.
    """

    def __init__(
        self,
        num_images: int = 24,
        draw_size: int = 32,
        broken: tuple[int, ...] = (),
        captions: int = 1,
        sides: tuple[tuple[float, float], ...] = ((1, 1),),
    ) -> None:
        self._num_images, self._draw_size, self._broken = num_images, draw_size, broken
        self._captions, self._sides = captions, sides

    def identity(self, units: list[str]) -> dict[str, Any]:
        return {"kind": "shapes", "num_images": self._num_images, "draw_size": self._draw_size}

    def units(self) -> Iterator[Unit]:
        for start in range(0, self._num_images, _UNIT):
            numbers = list(range(start, min(start + _UNIT, self._num_images)))
            yield Unit(hash_text(str(numbers)), numbers)

    def survey(self, unit: Unit) -> Iterator[Item | Skipped]:
        yield from (self._item(number) for number in unit.records)

    def read(self, item: Item, limit: int | None = None) -> bytes:
        return self._content(int(item.key.split("-")[1]))[:limit]

    def _item(self, number: int) -> Item:
        shape, colour = SHAPES[number % len(SHAPES)], COLOURS[number % len(COLOURS)]
        split = "unseen" if number % 6 == 5 else "train"
        captions = (f"a {colour} {shape}", f"{shape} in {colour}", f"a {shape}")[: self._captions]
        name = f"shape-{number:04d}"
        place = Place(name, 0, len(self._content(number)))
        return Item(
            key=name,
            split=split,
            captions=tuple((text, 1.0 + i) for i, text in enumerate(captions)),
            image=place,
            name=name,
            label=number % len(SHAPES),
        )

    def _content(self, number: int) -> bytes:
        if number in self._broken:
            return b"not an image"
        shape, colour = SHAPES[number % len(SHAPES)], COLOURS[number % len(COLOURS)]
        return _png(number, shape, colour, self._draw_size, self._sides[number % len(self._sides)])


def make_shards(
    folder: Path,
    num_images: int = 24,
    size: int = 32,
    *,
    channels: int = 4,
    patch_size: int = 2,
    shard_samples: int = 8,
    text_width: int = 32,
    captions: int = 1,
    sides: tuple[tuple[float, float], ...] = ((1, 1),),
    **changes: Any,
) -> Path:
    """Write a shard set into `folder` in about a tenth of a second, and return the folder.

    With the defaults: splits train (20) and unseen (4), latents (4, 8, 8), 16 tokens, text and pooled width 32.
    `changes` are fields of the recipe, such as buckets="32x32,16x64" (with pictures of several `sides`).
    """
    recipe = replace(shapes_recipe(size, channels, patch_size, shard_samples, text_width), **changes)
    prepare_shards(ShapesSource(num_images, size, (), captions, sides), folder, recipe, QUIET)
    return folder


def shapes_recipe(
    size: int = 32, channels: int = 4, patch_size: int = 2, shard_samples: int = 8, text_width: int = 32
) -> Recipe:
    codec = {"kind": "patch_pca", "patch": 4, "channels": channels, "whiten": 0.5}
    encoder = {"kind": "hash", "width": text_width, "max_length": 16}
    return Recipe(image_size=size, patch_size=patch_size, codec=codec, encoder=encoder, shard_samples=shard_samples)


def _png(number: int, shape: str, colour: str, size: int, sides: tuple[float, float]) -> bytes:
    generator = np.random.Generator(np.random.Philox(key=number))
    x, y = generator.uniform(0.35, 0.65, 2) * size
    r = generator.uniform(0.2, 0.3) * size
    image = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    else:
        draw.line((x - r, y, x + r, y), fill=colour, width=max(2, size // 8))
        draw.line((x, y - r, x, y + r), fill=colour, width=max(2, size // 8))
    content = io.BytesIO()
    if sides != (1, 1):
        image = image.resize((round(size * sides[1]), round(size * sides[0])))
    image.save(content, "png")
    return content.getvalue()
