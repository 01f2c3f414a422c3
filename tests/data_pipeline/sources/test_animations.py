"""Which frames of animated images are taken, and what becomes of them."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sources.animations import TooFewFramesError, chosen_frames, frames_of, load_clip
from data_pipeline.sources.images import UNREADABLE, load_picture, mirror

KINDS: dict[str, dict[str, Any]] = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}


def animation(levels: list[int], kind: str = "GIF", durations: Any = 50, **options: Any) -> bytes:
    """An animation of grey frames whose left half is black."""
    pictures = []
    for level in levels:
        picture = Image.new("RGB", (16, 8), (level, level, level))
        picture.paste((0, 0, 0), (0, 0, 8, 8))
        pictures.append(picture)
    stream = io.BytesIO()
    more = KINDS[kind] | options
    pictures[0].save(stream, kind, save_all=True, append_images=pictures[1:], duration=durations, **more)
    return stream.getvalue()


def levels_of(content: bytes, frames: int) -> list[int]:
    """The level of the right half of every frame that is taken."""
    pixels = load_clip(content, (8, 16), "crop", frames).pixels
    return [round(float(level)) for level in (pixels[0, :, 4, 12] + 1) * 127.5]


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_frames_as_there_are_are_taken_in_turn(kind: str) -> None:
    assert levels_of(animation([50, 100, 150, 200], kind), 4) == [50, 100, 150, 200]


@pytest.mark.parametrize("kind", KINDS)
def test_more_frames_are_thinned_evenly(kind: str) -> None:
    content = animation([20 * at for at in range(1, 11)], kind)
    assert levels_of(content, 5) == [40, 80, 120, 160, 200]  # shown in the middles of five parts: on the edge, the next
    assert levels_of(content, 2) == [60, 160]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_spaced_by_time_and_not_by_number(kind: str) -> None:
    content = animation([50, 100, 150, 200], kind, [100, 100, 100, 900])
    assert levels_of(content, 4) == [100, 200, 200, 200]
    assert chosen_frames([100, 100, 100, 900], 4) == [1, 3, 3, 3]


def test_frames_without_a_duration_count_alike() -> None:
    assert levels_of(animation([50, 100, 150, 200], "GIF", 0), 4) == [50, 100, 150, 200]


@pytest.mark.parametrize("count", range(1, 40))
def test_no_frame_is_taken_twice_where_all_last_equally_long(count: int) -> None:
    for frames in range(1, count + 1):
        chosen = chosen_frames([40] * count, frames)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == frames


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_frames_are_named(kind: str) -> None:
    with pytest.raises(TooFewFramesError, match=r"^too short: 3 frames, fewer than the 4 of --frames$"):
        load_clip(animation([1, 100, 200], kind), (8, 16), "crop", 4)


def test_still_pictures_and_pages_are_no_animations() -> None:
    for kind, options in (("JPEG", {}), ("TIFF", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))] * 9})):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, kind, **options)
        with pytest.raises(TooFewFramesError, match="1 frames"):
            load_clip(stream.getvalue(), (8, 8), "crop", 2)


def test_the_picture_that_an_apng_has_for_old_viewers_is_no_frame() -> None:
    content = animation([9, 50, 100, 150], "PNG", default_image=True)
    assert levels_of(content, 3) == [50, 100, 150]
    with pytest.raises(TooFewFramesError, match="3 frames"):
        load_clip(content, (8, 16), "crop", 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_animation_is_unreadable(kind: str) -> None:
    content = animation([7 * at for at in range(30)], kind)
    with pytest.raises(UNREADABLE):
        load_clip(content[: len(content) // 2], (8, 16), "crop", 30)


def test_every_frame_is_fitted_as_an_image_is() -> None:
    content = animation([200, 90])
    still, clip = load_picture(content, (8, 8), "pad"), load_clip(content, (8, 8), "pad", 2)
    assert clip.pixels.shape == (3, 2, 8, 8)
    assert np.array_equal(clip.pixels[:, 0], still.pixels)
    assert (clip.view, clip.enlarged) == (still.view, still.enlarged)
    assert [frame.pixels.shape for frame in frames_of(clip)] == [(3, 8, 8)] * 2
    assert frames_of(still) == [still]
    assert np.array_equal(mirror(clip).pixels, clip.pixels[..., ::-1])


def test_transparency_is_that_of_each_frame() -> None:
    pictures = [Image.new("RGBA", (8, 8), (255, 0, 0, 255)), Image.new("RGBA", (8, 8), (0, 0, 0, 0))]
    stream = io.BytesIO()
    pictures[0].save(stream, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    clip = load_clip(stream.getvalue(), (8, 8), "crop", 2)
    assert clip.alpha is not None
    assert clip.alpha.shape == (1, 2, 8, 8)
    assert clip.alpha.mean((0, 2, 3)).tolist() == [1, 0]
    assert clip.pixels[:, 1].min() == 1  # on white
    assert load_clip(animation([1, 2]), (8, 8), "crop", 2).alpha is None
