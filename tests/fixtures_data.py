"""Shard sets for any test: drawn shapes (`benchmarks/shapes.py`), and what only tests need of them."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from benchmarks.shapes import COLOURS as COLOURS
from benchmarks.shapes import QUIET as QUIET
from benchmarks.shapes import SHAPES as SHAPES
from benchmarks.shapes import ShapesSource as ShapesSource
from benchmarks.shapes import make_shards as make_shards
from benchmarks.shapes import shapes_recipe as shapes_recipe
from data_pipeline.prepare.recipe import Recipe
from data_pipeline.prepare.write import prepare_shards
from data_pipeline.sources.items import ImageSource, Item, Skipped
from data_pipeline.sources.open import SourceOptions, open_source


class Listing(NamedTuple):
    items: list[Item]
    skipped: list[Skipped]


def listing(source: ImageSource) -> Listing:
    """Everything that a source holds."""
    found = [entry for unit in source.units() for entry in source.survey(unit)]
    items = [entry for entry in found if isinstance(entry, Item)]
    return Listing(items, [entry for entry in found if isinstance(entry, Skipped)])


def tiny_autoencoder(folder: Path, levels: int = 2) -> Path:
    """Save an AutoencoderKL with random weights, factor 2^(levels - 1) and four channels, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[8] * levels,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


def tiny_qwen_autoencoder(folder: Path, channels: int = 3, levels: int = 2) -> Path:
    """Save an AutoencoderKLQwenImage with random weights and factor 2^levels, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1) + [True],
        latents_mean=[0.1 * number - 0.2 for number in range(channels)],
        latents_std=[0.5 + 0.25 * number for number in range(channels)],
    ).save_pretrained(folder)
    return folder


def make_animations(folder: Path, count: int = 12, frames: int = 4, side: int = 32) -> Path:
    """Write moving squares with captions as GIF, WebP and APNG files in turn; every third has one frame more."""
    folder.mkdir(parents=True)
    for number in range(count):
        colour, step = list(COLOURS)[number % len(COLOURS)], ((4, 0), (0, 4), (-4, 0))[number % 3]
        pictures = []
        for at in range(frames + (number % 3 == 2)):
            x, y = ((5 * number + at * move) % (side - 8) for move in step)
            picture = Image.new("RGB", (side, side), "white")
            picture.paste(colour, (x, y, x + 8, y + 8))
            pictures.append(picture)
        kind = ("gif", "webp", "png")[number % 3]
        exact = {"lossless": True} if kind == "webp" else {}
        path = folder / f"{number:02}.{kind}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0, **exact)
        way = ("right", "down", "left")[number % 3]
        path.with_suffix(".txt").write_text(f"a {colour} square moving {way}")
    return folder


def make_clips(folder: Path, count: int = 12, frames: int = 4, **fields: Any) -> Path:
    """Write animations and prepare them as shards of clips; return the shards."""
    recipe = Recipe(
        image_size=32,
        encoder={"kind": "hash", "width": 32, "max_length": 16},
        codec={"kind": "patch_pca", "patch": 4, "channels": 4, "whiten": 0.5},
        frames=frames,
        **fields,
    )
    source = open_source(SourceOptions(source=str(make_animations(folder / "animations", count, frames))))
    prepare_shards(source, folder / "shards", recipe, QUIET)
    return folder / "shards"


def make_unequal_shards(folder: Path, num_images: int = 36) -> Path:
    """Write pictures in three sizes of unequal token counts, without a codec.

    Latents (3, 8, 8), (3, 4, 14) and (3, 10, 12): 16, 14 and 30 tokens. Splits train (30) and unseen (6), both with all
    sizes.
    """
    square, wide, large = (1.0, 1.0), (1.0, 3.5), (1.0, 1.2)
    sides = (square, wide, large, square, wide)
    return make_shards(folder, num_images, codec={"kind": "pixel"}, buckets="8x8,4x14,10x12", sides=sides)
