import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharpmoe.evaluation.allocation import measure_allocation
from sharpmoe.report import figures
from sharpmoe.report.figures import _LINES, CELL, GAP
from tests.toys import ToySamples, toy_model


@dataclass
class FixedWidth:
    """A font whose every character is one pixel wide."""

    def getlength(self, text: str) -> float:
        return len(text)


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
        ("one\ntwo\tx\x00\udc80", ["one two", "x"]),  # no font draws a line break or a control character
        ("\n\x07", []),
    ],
)
def test_captions_are_broken_between_words(text: str, lines: list[str]) -> None:
    assert figures.wrap(text, 7, FixedWidth()) == lines


def test_captions_of_several_lines_and_none_are_drawn() -> None:
    images = torch.zeros(3, 3, 4, 4)
    grid = figures.sample_grid(images, ["line one\nline two", "bell\x07, \udcff", "\r\n"])
    assert np.array_equal(grid, figures.sample_grid(images, ["line one line two", "bell, ", ""]))


def test_a_grid_holds_every_image_in_reading_order() -> None:
    colours = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]])
    grid = figures.sample_grid(colours[:, :, None, None].expand(5, 3, 4, 4), ["caption"] * 5, columns=3)
    row_height = (grid.shape[0] - GAP) // 2
    middle = CELL // 2 + GAP
    found = [grid[middle + i // 3 * row_height, middle + i % 3 * (CELL + GAP)].tolist() for i in range(5)]
    assert found == [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]
    assert (grid[GAP + CELL + 2 : row_height, GAP : GAP + CELL] < 128).any()  # the caption


def test_allocation_curves_take_undefined_figures() -> None:
    results = {name: measure_allocation(toy_model(name), ToySamples(), images=3) for name in ("tc", "ec")}
    assert all(math.isnan(e.mean) for e in results["tc"].saliency_by_time.values())
    assert figures.allocation_curves(results).shape[2] == 3


def test_saving_makes_the_folder(tmp_path: Path) -> None:
    pixels = figures.step_curves({"total": {1: 2.0, 2: 1.0}, "flow": {1: 1.0}}, "loss", logarithmic=True)
    path = figures.save_png(pixels, tmp_path / "a" / "b.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_pictures_of_another_aspect_are_not_stretched() -> None:
    grid = figures.sample_grid(torch.full((1, 3, 4, 8), -1.0), ["a"], columns=1)
    black = (grid == 0).all(axis=-1)
    assert black.any(axis=0).sum() == CELL
    assert black[GAP : GAP + CELL, GAP : GAP + CELL].any(axis=1).sum() == CELL // 2


def test_a_grid_of_clips_has_a_row_for_each_with_its_frames_in_turn() -> None:
    levels = torch.linspace(-1, 1, 5)
    clips = levels.view(1, 1, 5, 1, 1).expand(2, 3, 5, 8, 8)
    grid = figures.sample_grid(clips, ["up", "again " * 60])
    side, step = CELL * 2 // 3, CELL * 2 // 3 + GAP // 2
    seen = [int(grid[GAP + side // 2, GAP + side // 2 + at * step, 0]) for at in range(5)]
    assert seen == [0, 64, 128, 191, 255]
    assert figures.sample_grid(clips.repeat(1, 1, 40, 1, 1), ["up", "down"]).shape[1] < 17 * step + 3 * GAP


def test_an_animation_comes_back_frame_by_frame(tmp_path: Path) -> None:
    (frames,) = figures.clip_pixels(torch.rand(1, 3, 4, 8, 12) * 2 - 1)
    path = figures.save_animation(frames, tmp_path / "new" / "clip.webp", 70)
    with Image.open(path) as image:
        assert (image.n_frames, image.format, image.info["loop"]) == (4, "WEBP", 0)
        for number, frame in enumerate(frames):
            image.seek(number)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)
            assert image.info["duration"] == 70


def test_curves_after_the_last_colour_have_another_line() -> None:
    looks = [(style["color"], style["linestyle"]) for style in _LINES]
    assert len(set(looks)) == len(looks) == 40
    assert {line for _, line in looks[:10]} == {"-"}  # as matplotlib draws a few
    assert [colour for colour, _ in looks[:10]] == [colour for colour, _ in looks[10:20]]
