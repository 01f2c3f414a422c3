import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharpmoe.evaluation import allocation
from sharpmoe.report import figures
from sharpmoe.report.figures import CELL, GAP, Sheet
from tests.toys import ToySamples, toy_model


@dataclass
class FixedWidth:
    """A font whose every character is one pixel wide."""

    def getlength(self, text: str) -> float:
        return len(text)


def sheet(images: int = 2, most: int = 5) -> Sheet:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(images, 16, generator=g)
    mask[0] = torch.nan
    return Sheet(
        torch.rand(images, 3, 8, 8, generator=g) * 2 - 1,
        torch.rand(images, 16, generator=g),
        mask,
        torch.randint(0, most, (images, 3, 16), generator=g).float(),
        (0.999, 0.5, 0.05),
        tuple(f"caption {i}" for i in range(images)),
    )


def test_pixels_are_scaled_and_clipped() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert figures.to_pixels(levels)[0][0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a red apple", ["a red", "apple"]),
        ("a red apple on a table", ["a red", "apple", "on a…"]),
        ("antidisestablishmentarianism", ["antidis", "establi", "shment…"]),
        ("", []),
    ],
)
def test_captions_are_broken_between_words(text: str, lines: list[str]) -> None:
    assert figures.wrap(text, 7, FixedWidth()) == lines


def test_a_grid_holds_every_image_in_reading_order() -> None:
    colours = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]])
    grid = figures.sample_grid(colours[:, :, None, None].expand(5, 3, 4, 4), ["caption"] * 5, columns=3)
    row_height = (grid.shape[0] - GAP) // 2
    middle = CELL // 2 + GAP
    found = [grid[middle + i // 3 * row_height, middle + i % 3 * (CELL + GAP)].tolist() for i in range(5)]
    assert found == [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]
    assert (grid[GAP + CELL + 2 : row_height, GAP : GAP + CELL] < 128).any()  # the caption


def test_a_sheet_has_one_row_per_image_and_ignores_missing_masks() -> None:
    one, two = (figures.routing_sheet(sheet(n)) for n in (1, 2))
    assert one.dtype == np.uint8
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > 1.4 * one.shape[0]


def test_sheets_on_one_scale_can_be_compared() -> None:
    counts = sheet()
    doubled = counts._replace(experts=counts.experts * 2)
    assert np.array_equal(figures.routing_sheet(counts, most=8), figures.routing_sheet(counts, most=8))
    assert not np.array_equal(figures.routing_sheet(counts, most=8), figures.routing_sheet(doubled, most=8))


def test_allocation_curves_take_undefined_figures() -> None:
    results = {name: allocation.measure(toy_model(name), ToySamples(), images=3) for name in ("tc", "ec")}
    assert all(math.isnan(e.mean) for e in results["tc"].saliency_by_time.values())
    assert figures.allocation_curves(results).shape[2] == 3


def test_saving_makes_the_folder(tmp_path: Path) -> None:
    pixels = figures.curves({"total": {1: 2.0, 2: 1.0}, "flow": {1: 1.0}}, "loss", logarithmic=True)
    path = figures.save(pixels, tmp_path / "a" / "b.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_pictures_of_another_aspect_are_not_stretched() -> None:
    grid = figures.sample_grid(torch.full((1, 3, 4, 8), -1.0), ["a"], columns=1)
    black = (grid == 0).all(axis=-1)
    assert black.any(axis=0).sum() == CELL
    assert black[GAP : GAP + CELL, GAP : GAP + CELL].any(axis=1).sum() == CELL // 2
    wide = sheet()._replace(images=torch.zeros(2, 3, 4, 16))
    assert figures.routing_sheet(wide).shape[2] == 3
