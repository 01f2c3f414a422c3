import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.images import UNREADABLE, is_enlarged, load_map, load_picture


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


def profile(name: str, *primaries: tuple[float, float, float]) -> bytes:
    """An ICC profile (version 2) of three primaries in XYZ and a gamma of 2.2."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    text = name.encode() + b"\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    white = (0.9642, 1.0, 0.8249)
    points = [b"XYZ \0\0\0\0" + b"".join(map(fixed, point)) for point in (white, *primaries)]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
    tags = dict(zip((b"desc", b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"), [desc, *points], strict=True))
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, white))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
SWAPPED = profile("red and blue swapped", BLUE, GREEN, RED)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_to_srgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (250, 0, 0)).convert(mode)
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))
    plain = rgb(load_picture(encoded(image), (8, 8)).pixels)
    seen = load_picture(encoded(image, icc_profile=SWAPPED), (8, 8))
    assert rgb(seen.pixels)[2] == pytest.approx(plain[0], abs=2)
    assert rgb(seen.pixels)[0] == pytest.approx(plain[2], abs=2)
    assert (seen.alpha is not None) == (mode == "RGBA")


@pytest.mark.parametrize("content", [b"no profile", profile("sRGB by another name", BLUE, GREEN, RED), SWAPPED[:200]])
def test_srgb_and_broken_profiles_change_nothing(content: bytes) -> None:
    image = Image.new("RGB", (8, 8), (250, 10, 10))
    plain = load_picture(encoded(image), (8, 8)).pixels
    assert (load_picture(encoded(image, icc_profile=content), (8, 8)).pixels == plain).all()


def test_pad_keeps_the_whole_picture_on_white() -> None:
    picture = load_picture(encoded(Image.new("RGB", (40, 10), "red")), (16, 16), "pad")
    assert picture.pixels.shape == (3, 16, 16)
    assert picture.alpha is None
    assert (picture.pixels[:, :6] == 1).all()
    assert (picture.pixels[:, 10:] == 1).all()
    assert (picture.pixels[0, 6:10] == 1).all()
    assert (picture.pixels[1:, 6:10] == -1).all()


def test_pad_is_no_foreground_and_changes_nothing_where_the_shape_fits() -> None:
    image = Image.new("RGBA", (10, 40), (255, 0, 0, 128))
    alpha = load_picture(encoded(image), (16, 16), "pad").alpha
    assert alpha is not None
    assert (alpha[0, :, :6] == 0).all()
    assert (alpha[0, :, 6:10] > 0.4).all()
    square = encoded(Image.effect_noise((40, 40), 50))
    assert (load_picture(square, (16, 16), "pad").pixels == load_picture(square, (16, 16)).pixels).all()


@pytest.mark.parametrize(
    ("image", "fit", "enlarged"),
    [
        ((16, 16), "crop", False),
        ((15, 99), "crop", True),
        ((99, 15), "crop", True),
        ((15, 99), "pad", False),
        ((15, 15), "pad", True),
        ((16, 3), "pad", False),
    ],
)
def test_enlarged_pictures_are_marked(image: tuple[int, int], fit: str, enlarged: bool) -> None:
    size = (16, 16)
    assert load_picture(encoded(Image.new("RGB", image)), size, fit).enlarged is enlarged
    assert is_enlarged(np.array([image]), size, fit).tolist() == [enlarged]


def test_a_pointer_of_git_lfs_says_so() -> None:
    with pytest.raises(ValueError, match="a pointer of Git LFS, not the picture itself"):
        load_picture(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", (8, 8))


# --- maps -------------------------------------------------------------------------------------------------------------


def _ramp(height: int, width: int) -> np.ndarray:
    """Grey levels that rise to the right and below: any part of it tells where it is."""
    rows, columns = np.mgrid[0.5:height, 0.5:width]
    return (rows / height * 120 + columns / width * 120).astype(np.float32)


def _file(levels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(levels))


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_a_map_is_fitted_as_its_picture(fit: str, size: tuple[int, int], scale: float) -> None:
    height, width = 300, 200
    picture = load_picture(_file(_ramp(height, width).round().astype(np.uint8)), size, fit)
    assert picture.view is not None
    content = _file(_ramp(round(height * scale), round(width * scale)).round().astype(np.uint8))
    found = load_map(content, picture.view)
    assert found.shape == (1, *size)
    seen = (picture.pixels[:1] + 1) / 2
    bars = seen == 1
    np.testing.assert_allclose(found[~bars], seen[~bars], atol=0.02)
    assert (found[bars] == 0).all()


def test_maps_of_16_bits_colours_and_transparency_are_grey() -> None:
    view = load_picture(_file(np.zeros((8, 8), np.uint8)), (8, 8)).view
    assert view is not None
    for image in (
        np.full((4, 4), 32768, np.uint16),
        np.full((4, 4, 3), 128, np.uint8),
        np.concatenate([np.full((4, 4, 3), 128, np.uint8), np.zeros((4, 4, 1), np.uint8)], 2),
    ):
        np.testing.assert_allclose(load_map(_file(image), view), 0.5, atol=0.003)
    with pytest.raises(UNREADABLE):
        load_map(b"no picture", view)
