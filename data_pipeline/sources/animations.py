"""Frames of animated images (GIF, WebP, APNG): which ones are taken, decoded to one array."""

from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.sources.images import Picture, fit_picture, open_image

_ANIMATED = ("GIF", "PNG", "WEBP")  # other formats hold pages or sizes, which are no frames
_MOST_FRAMES = 10_000  # of a file
_MOST_PIXELS = 2_000_000_000  # of all frames of a file
_USUAL_MS = 100  # of a frame that states no duration, as browsers show it


class TooFewFramesError(ValueError):
    """An animation has fewer frames than are asked for; the message is the whole reason."""


def load_clip(source: Path | bytes, size: tuple[int, int], fit: str, frames: int) -> Picture:
    """Decode `frames` frames of an animation, evenly spaced in time, each as `load_picture` decodes an image.

    The time that the animation takes is cut into `frames` equal parts, and of each the frame is taken that is shown in
    its middle. With frames of equal duration no frame is taken twice.

    Returns:
        Picture with pixels (3, T, H, W), and alpha (1, T, H, W), or None where every frame is opaque.

    Raises one of `UNREADABLE` where the file cannot be decoded, among them `TooFewFramesError`.
    """
    with open_image(source) as opened:
        first, durations = _durations(opened, frames)
        pictures: dict[int, Picture] = {}
        chosen = chosen_frames(durations, frames)
        for number in sorted(set(chosen)):
            opened.seek(first + number)
            pictures[number] = fit_picture(opened, size, fit)
    return _joined([pictures[number] for number in chosen])


def frames_of(picture: Picture) -> list[Picture]:
    """Return the frames of a clip, each as an image; an image is its only frame. A map of saliency is of all frames."""
    if picture.pixels.ndim == 3:
        return [picture]
    return [
        picture._replace(pixels=picture.pixels[:, at], alpha=None if picture.alpha is None else picture.alpha[:, at])
        for at in range(picture.pixels.shape[1])
    ]


def chosen_frames(durations: list[int], frames: int) -> list[int]:
    """Return the numbers of the frames that are shown in the middles of `frames` equal parts of the time.

    durations: of every frame, in milliseconds, above 0.
    """
    ends = np.array([*accumulate(durations)], dtype=np.int64)
    middles = np.arange(1, 2 * frames, 2, dtype=np.int64) * ends[-1]  # over 2 frames: whole numbers on every machine
    return [int(number) for number in np.searchsorted(2 * frames * ends, middles, side="right")]


def _durations(opened: Image.Image, frames: int) -> tuple[int, list[int]]:
    """Return the number of the first frame, and the milliseconds of each. Raises TooFewFramesError, ValueError."""
    count = getattr(opened, "n_frames", 1) if opened.format in _ANIMATED else 1
    first = int(bool(opened.info.get("default_image")) and count > 1)  # APNG: a picture for viewers that know no frames
    if count - first < frames:
        raise TooFewFramesError(f"too short: {count - first} frames, fewer than the {frames} of --frames")
    if count > _MOST_FRAMES or count * opened.width * opened.height > _MOST_PIXELS:
        raise ValueError(
            f"{count} frames of {opened.width}x{opened.height} pixels, at most {_MOST_FRAMES} frames and "
            f"{_MOST_PIXELS} pixels in all are decoded"
        )
    durations = []
    for number in range(first, count):
        opened.seek(number)
        opened.load()  # WebP knows the duration of a frame when it is decoded
        durations.append(round(opened.info.get("duration") or 0) or _USUAL_MS)
    return first, durations


def _joined(pictures: list[Picture]) -> Picture:
    pixels = np.stack([picture.pixels for picture in pictures], axis=1)
    alphas = [picture.alpha for picture in pictures]
    alpha = None
    if any(each is not None for each in alphas):
        opaque = np.ones((1, *pixels.shape[2:]), np.float32)
        alpha = np.stack([opaque if each is None else each for each in alphas], axis=1)
    return pictures[0]._replace(pixels=pixels, alpha=alpha)
