from pathlib import Path

import numpy as np
from PIL import Image

from sharpmoe.report.embedded import PictureBudget, map_pixels


def noise(path: Path, height: int, width: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_small_pictures_stay_png_and_large_ones_become_webp(tmp_path: Path) -> None:
    budget = PictureBudget()
    small, large = noise(tmp_path / "s.png", 20, 20), noise(tmp_path / "l.png", 900, 900)
    assert "data:image/png;base64," in budget.file(small, "small")
    shown = budget.file(large, "large")
    assert "data:image/webp;base64," in shown
    assert len(shown) < 4 / 3 * large.stat().st_size
    assert "data:image/webp" in budget.file(noise(tmp_path / "t.png", 20_000, 5), "taller than WebP can be")


def test_pictures_beyond_the_limit_are_left_out_and_named(tmp_path: Path) -> None:
    budget, path = PictureBudget(limit=2500), noise(tmp_path / "s.png", 20, 20)
    assert budget.file(path, "first")
    assert not budget.file(path, "second")
    assert budget.left_out == ["second"]


def test_a_damaged_picture_is_a_note(tmp_path: Path) -> None:
    path = tmp_path / "<b>.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    shown = PictureBudget().file(path, "<i>")
    assert "cannot be read" in shown
    assert "<i>" not in shown
    assert "<b>" not in shown
    assert "cannot be read" in PictureBudget().file(tmp_path / "absent.png", "absent")


def test_colours_share_one_scale() -> None:
    low, middle, high, beyond = map_pixels(np.array([[0.5, 1.0, 1.5, 9.0]]), "RdBu_r", 0.5, 1.5)[0]
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert (beyond == high).all()
    assert middle.min() > 240
