"""Shard sets for any test: drawn shapes (`benchmarks/shapes.py`), and what only tests need of them."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.shapes import COLOURS as COLOURS
from benchmarks.shapes import QUIET as QUIET
from benchmarks.shapes import SHAPES as SHAPES
from benchmarks.shapes import ShapesSource as ShapesSource
from benchmarks.shapes import make_shards as make_shards
from benchmarks.shapes import shapes_recipe as shapes_recipe
from data_pipeline.sources.items import ImageSource, Item, Skipped


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


def make_unequal_shards(folder: Path, num_images: int = 36) -> Path:
    """Write pictures in three sizes of unequal token counts, without a codec.

    Latents (3, 8, 8), (3, 4, 14) and (3, 10, 12): 16, 14 and 30 tokens. Splits train (30) and unseen (6), both with all
    sizes.
    """
    square, wide, large = (1.0, 1.0), (1.0, 3.5), (1.0, 1.2)
    sides = (square, wide, large, square, wide)
    return make_shards(folder, num_images, codec={"kind": "pixel"}, buckets="8x8,4x14,10x12", sides=sides)
