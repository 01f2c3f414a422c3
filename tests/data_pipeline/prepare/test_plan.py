import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.encode.codecs import ImageSize, divided
from data_pipeline.prepare.plan import bucket_lines, bucket_resolutions, nearest_buckets
from sharpmoe.errors import DataError


def latent_shape(image_size: ImageSize) -> tuple[int, int, int]:
    return 4, *divided(image_size, 8, "vae")


def test_one_square_where_nothing_is_asked() -> None:
    (square,) = bucket_resolutions("", 256, 2, latent_shape)
    assert (square.image, square.latent, square.grid, square.name) == ((256, 256), (4, 32, 32), (16, 16), "256x256")


@given(st.integers(1, 600))
def test_every_grid_of_a_number_of_tokens(tokens: int) -> None:
    try:
        found = bucket_resolutions(str(tokens), 256, 2, latent_shape)
    except DataError:
        found = []
    expected = {(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0 and tokens <= 3 * h * h <= 9 * tokens}
    assert {entry.grid for entry in found} == expected
    assert all(entry.image == (entry.grid[0] * 16, entry.grid[1] * 16) for entry in found)


def test_a_list_of_resolutions() -> None:
    found = bucket_resolutions("256x256, 128x512", 64, 2, latent_shape)
    assert [(entry.image, entry.grid) for entry in found] == [((256, 256), (16, 16)), ((128, 512), (8, 32))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("256x256,256x512", "same number of tokens, but 256x256 has 256, 256x512 has 512"),
        ("256x256,100x100", "100: codec vae needs a multiple of 8"),
        ("8x8", "patch size 2 does not divide the 1x1 latent"),
        ("256x256,256x256", "is listed twice"),
        ("wide", "expected a number of tokens, or a list"),
        ("0x16", "expected a number of tokens, or a list"),
        ("7", "no grid of 7 tokens"),
    ],
)
def test_tables_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bucket_resolutions(spec, 256, 2, latent_shape)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_where_least_is_cut_off(height: int, width: int) -> None:
    resolutions = bucket_resolutions("240", 256, 2, latent_shape)
    chosen = int(nearest_buckets(np.array([[height, width]]), resolutions)[0])

    def kept(image: tuple[int, int]) -> float:
        shape, target = height / width, image[0] / image[1]
        return min(shape / target, target / shape)

    assert kept(resolutions[chosen].image) >= max(kept(entry.image) for entry in resolutions) - 1e-9


def test_the_report_counts_and_warns() -> None:
    resolutions = bucket_resolutions("128x512,256x256,512x128", 256, 2, latent_shape)
    pixels = np.array([[300, 300]] * 100 + [[100, 400]] * 3 + [[200, 300]])
    chosen = nearest_buckets(pixels, resolutions)
    lines = bucket_lines(resolutions, chosen, pixels, np.arange(104) % 2 == 0)
    assert lines[0] == "bucket 128x512 (8x32 tokens): 3 pictures, 2 to train on, 3 enlarged"
    assert lines[1] == "bucket 256x256 (16x16 tokens): 101 pictures, 50 to train on, 1 enlarged"
    assert lines[2] == "bucket 512x128 (32x8 tokens): 0 pictures, 0 to train on, 0 enlarged"
    assert lines[3].startswith("small buckets, below 64 pictures to train on: 128x512 (2), 256x256 (50), 512x128 (0);")
    assert len(bucket_lines(resolutions[1:2], chosen * 0, pixels, chosen < 3)) == 1
