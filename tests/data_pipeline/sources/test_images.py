import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.images import UNREADABLE, load_picture


def encoded(image: Image.Image, form: str = "png", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def rgb(picture: np.ndarray) -> list[int]:
    """The colour of the middle, 0..255."""
    return [round((float(value) + 1) * 127.5) for value in picture[:, picture.shape[1] // 2, picture.shape[2] // 2]]


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGB", (8, 8), (200, 100, 50)), [200, 100, 50]),
        (Image.new("L", (8, 8), 77), [77, 77, 77]),
        (Image.new("1", (8, 8), 1), [255, 255, 255]),
        (Image.new("P", (8, 8), 1), None),
        (Image.new("RGB", (8, 8), (200, 100, 50)).quantize(4), [200, 100, 50]),
        (Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16)), [128, 128, 128]),
        (Image.new("LA", (8, 8), (0, 51)), [204, 204, 204]),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), [255, 127, 127]),
    ],
    ids=["rgb", "grey", "bits", "palette", "quantised", "16-bit", "grey-alpha", "transparent", "half"],
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, colour: list[int] | None) -> None:
    picture = load_picture(encoded(image), (8, 8))
    assert picture.pixels.shape == (3, 8, 8)
    assert picture.pixels.dtype == np.float32
    assert (picture.alpha is not None) == (image.mode in ("LA", "RGBA"))
    assert colour is None or rgb(picture.pixels) == colour


def test_a_jpeg_in_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    red, green, blue = rgb(load_picture(path, (8, 8)).pixels)
    assert red > 200 > 60 > max(green, blue)


def test_a_palette_with_a_transparent_entry_has_alpha() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    picture = load_picture(encoded(image, transparency=0), (8, 8))
    assert picture.alpha is not None
    assert picture.alpha[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert picture.pixels[:, 0, 0].tolist() == [1, 1, 1]


def test_opaque_alpha_is_no_mask() -> None:
    assert load_picture(encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 255))), (8, 8)).alpha is None


def test_colours_of_transparent_pixels_do_not_bleed() -> None:
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))  # invisible green
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    picture = load_picture(encoded(image), (8, 8))
    red, green, blue = picture.pixels
    assert np.allclose(green, blue, atol=0.02)
    assert red.min() > 0.98


def test_exif_rotation_is_applied_before_the_crop() -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the upper half ends up on the right
    pixels = load_picture(encoded(image, "png", exif=exif), (8, 8)).pixels
    assert pixels[0, :, 0].max() < -0.9
    assert pixels[0, :, 7].min() > 0.9


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_the_middle_square_is_kept(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "white")
    image.paste("black", ((size[0] - 8) // 2, (size[1] - 8) // 2, (size[0] + 8) // 2, (size[1] + 8) // 2))
    assert load_picture(encoded(image), (8, 8)).pixels.max() == -1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        encoded(Image.effect_noise((64, 64), 90))[:900],
        encoded(Image.effect_noise((64, 64), 90), "jpeg")[:900],
        encoded(Image.effect_noise((64, 64), 90), "webp")[:900],
        encoded(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "tiff"),
    ],
    ids=["empty", "text", "cut-png", "cut-jpeg", "cut-webp", "float-tiff"],
)
def test_what_cannot_be_decoded_says_so(content: bytes) -> None:
    with pytest.raises(UNREADABLE):
        load_picture(content, (8, 8))
