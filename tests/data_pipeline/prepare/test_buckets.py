import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.encode.codecs import ImageSize, divided
from data_pipeline.prepare.buckets import bucket_lines, bucket_resolutions, nearest_buckets
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
        ("256x256,100x100", "100: codec vae needs a multiple of 8"),
        ("8x8", "patch size 2 does not divide the 1x1 latent; sides must be multiples of 16 pixels"),
        ("256x256,256x256", "is listed twice"),
        ("wide", "expected a list as 64x64,48x80"),
        ("0x16", "expected a list as 64x64,48x80"),
        ("256x256,", "expected a list as 64x64,48x80"),
        ("-16x16", "expected a list as 64x64,48x80"),
        ("16384x16384", "16384x16384: more than 64 megapixels"),
        (",".join(f"16x{16 * number}" for number in range(1, 258)), "257 resolutions, at most 256"),
        ("7", "no grid of 7 tokens"),
        ("0", "expected 1 to 262144 tokens"),
        ("999999999", "expected 1 to 262144 tokens"),
        ("9" * 5000, "expected a list as"),
    ],
)
def test_tables_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bucket_resolutions(spec, 256, 2, latent_shape)


def test_resolutions_may_differ_in_tokens() -> None:
    found = bucket_resolutions("256x256,192x336", 64, 2, latent_shape)
    assert [(entry.image, entry.tokens) for entry in found] == [((256, 256), 256), ((192, 336), 252)]


def test_the_table_of_a_base_is_that_of_the_public_trainers() -> None:
    found = bucket_resolutions("512", 512, 2, latent_shape, 64)
    assert [entry.name for entry in found] == [
        *("768x320", "704x320", "640x384", "576x448", "512x512", "448x576", "384x640", "320x704", "320x768")
    ]
    assert {entry.tokens for entry in found} == {960, 880, 1008, 1024}
    found = bucket_resolutions("1024", 1024, 2, latent_shape, 64)
    assert {"1024x1024", "1152x896", "832x1216", "768x1344", "640x1536"} <= {entry.name for entry in found}  # SDXL's


@given(st.integers(1, 40), st.integers(1, 640))
def test_buckets_of_any_base(steps: int, base: int) -> None:
    step = 16 * steps
    if step > base:
        return
    found = bucket_resolutions(str(base), base, 2, latent_shape, step)
    sizes = [entry.image for entry in found]
    assert (base // step * step,) * 2 in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= base * base
        assert max(height, width) <= 3 * min(height, width)
        # No free room: one step more in both directions would exceed the area.
        assert (height + step) * (width + step) > base * base


@pytest.mark.parametrize(
    ("spec", "step", "message"),
    [
        (
            "512",
            20,
            "--buckets 512 --bucket-step 20: a step must be a whole number of tokens; image size 20: codec vae",
        ),
        ("512", 24, "does not divide the 3x3 latent; sides must be multiples of 16 pixels"),
        ("512", 1024, "--buckets 512 --bucket-step 1024: expected a step from 1 to the side of 512 pixels"),
        ("8192", 16, "at most 256 are taken; raise --bucket-step|expected 1 to 8000 pixels"),
        ("8000", 16, "at most 256 are taken; raise --bucket-step"),
        ("", 64, "--bucket-step 64: needs the side of a square in pixels, as --buckets 512 --bucket-step 64"),
        ("64x64", 64, "--bucket-step 64: needs the side of a square"),
    ],
)
def test_bases_that_cannot_be(spec: str, step: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bucket_resolutions(spec, 512, 2, latent_shape, step)


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
    told = "bucket 128x512 (8x32 = 256 tokens): 3 pictures, 2 to train on, 3 enlarged, 0.0% cut off"
    assert lines[0] == told
    told = "bucket 256x256 (16x16 = 256 tokens): 101 pictures, 50 to train on, 1 enlarged, 0.3% cut off"
    assert lines[1] == told
    assert lines[2] == "bucket 512x128 (32x8 = 256 tokens): 0 pictures, 0 to train on, 0 enlarged"
    assert lines[3].startswith("small buckets, below 64 pictures to train on: 128x512 (2), 256x256 (50);")
    unknown = bucket_lines(resolutions[1:2], chosen * 0, pixels * 0, chosen < 3)  # squares: no sizes are listed
    assert unknown[0] == "bucket 256x256 (16x16 = 256 tokens): 104 pictures, 104 to train on"
    assert "white bars" in bucket_lines(resolutions, chosen, pixels, chosen < 3, "pad")[1]
    all_train = bucket_lines(resolutions, chosen, pixels, chosen < 3)
    # What is left of one shape alone is no advice: buckets are there to keep shapes.
    assert all_train[3].startswith("small buckets, below 64 pictures to train on: 128x512 (3);")
    assert all_train[3].endswith(
        "takes some of its pictures twice in a step: add pictures of these shapes, or leave the buckets out"
    )
    many = np.repeat([0, 1, 2], [100, 70, 2])
    lines = bucket_lines(resolutions, many, np.array([[300, 300]] * 172), many < 3)
    assert lines[3].endswith("or leave the buckets out (--buckets 128x512,256x256)")
    assert len(bucket_lines(resolutions[1:2], chosen * 0, pixels, chosen < 3)) == 1
