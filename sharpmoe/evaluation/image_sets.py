"""Sets of images to be judged: an .npz batch, a folder of pictures, a split of prepared shards; published statistics.

All give uint8 RGB images (B, 3, H, W), in the order in which they are stored, a batch in memory at a time.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.encode.codecs import Codec
from data_pipeline.index import INDEX_FILE
from data_pipeline.read.shards import ShardSet
from sharpmoe.console import print_note
from sharpmoe.errors import DataError, first_line
from sharpmoe.evaluation.captions import captions_of_files
from sharpmoe.evaluation.distances import Gaussian

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow would pass others (EPS) to other programs, by a file's content alone
_TAKEN = "an .npz with arr_0 (N, H, W, 3) uint8, a folder of pictures, or prepared shards (FOLDER or FOLDER:SPLIT)"


class ImageSet(NamedTuple):
    """Images in a fixed order, and what a protocol says of them."""

    name: str  # in tables
    num_images: int
    batches: Callable[[int], Iterator[Tensor]]  # of at most so many images: (B, 3, H, W) uint8
    about: dict[str, str]  # for the protocol: what the set is, and a digest where it is one file
    captions: Callable[[], tuple[str, ...]] | None = None  # of all images; raises DataError. None: it has none


class Statistics(NamedTuple):
    """Published statistics of a reference set: features of Inception, without the images."""

    pool: Gaussian | None  # mu, sigma
    spatial: Gaussian | None  # mu_s, sigma_s
    about: dict[str, str]


def open_images(place: str) -> ImageSet:
    """Open a set of images. Raises DataError where `place` is none, or holds none."""
    path = Path(place)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _npz_images(path)
    folder, _, split = place.partition(":")
    if (Path(folder) / INDEX_FILE).is_file():
        return _shard_images(folder, split or "unseen")
    if path.is_dir():
        return _folder_images(path)
    raise DataError(f"{place}: no set of images; expected {_TAKEN}")


def has_images(path: Path) -> bool:
    """Whether an .npz holds images beside statistics, as the ADM evaluator's reference batches do."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(path: Path) -> Statistics | None:
    """Read mu, sigma (and mu_s, sigma_s) of an .npz, as the ADM evaluator's reference batches hold them; else None.

    Raises DataError for a damaged file.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            parts = {key: archive[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in archive}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no readable .npz ({first_line(error)})") from None
    if not parts:
        return None
    for name, values in parts.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise DataError(f"{path}: {name} ({values.dtype}) is not all finite numbers; compute the statistics again")
    pool, spatial = (
        Gaussian(parts[mean].astype(np.float64), parts[sigma].astype(np.float64))
        if mean in parts and sigma in parts
        else None
        for mean, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    for part in (pool, spatial):
        if part is not None and (part.mean.ndim != 1 or part.covariance.shape != (part.mean.size,) * 2):
            raise DataError(f"{path}: mean {part.mean.shape} does not fit covariance {part.covariance.shape}")
    return Statistics(pool, spatial, {"statistics": path.name, "sha256": _digest(path)})


def _npz_images(path: Path) -> ImageSet:
    """arr_0 of an .npz, as DiT, ADM and launcher/sample.py write it; read in turn, never whole."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, kind = _npy_header(file)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no images found ({first_line(error)}); expected {_TAKEN}") from None
    if len(shape) != 4 or shape[3] != 3 or kind != np.uint8 or 0 in shape:
        raise DataError(f"{path}: arr_0 is {kind} {shape}; expected uint8 (N, H, W, 3)")

    def batches(size: int) -> Iterator[Tensor]:
        one = int(np.prod(shape[1:]))
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _npy_header(file)
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                content = file.read(count * one)
                if len(content) != count * one:
                    raise DataError(f"{path}: ends after {start + len(content) // one} of {shape[0]} images")
                pixels = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)

    return ImageSet(path.stem, shape[0], batches, {"images": path.name, "sha256": _digest(path)})


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    if fortran:
        raise ValueError("arr_0 is in Fortran order")
    return shape, kind


def _folder_images(folder: Path) -> ImageSet:
    """All pictures below a folder, by path. They must be of one size: how they are resized decides the figure."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no pictures found ({', '.join(sorted(_SUFFIXES))}); expected {_TAKEN}")

    def batches(size: int) -> Iterator[Tensor]:
        expected = _pixels(files[0]).shape
        for start in range(0, len(files), size):
            found = [_pixels(path) for path in files[start : start + size]]
            for path, pixels in zip(files[start : start + size], found, strict=True):
                if pixels.shape != expected:
                    raise DataError(
                        f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, others of the set "
                        f"{expected[1]} x {expected[0]}; crop and resize them to one size first"
                    )
            yield torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)

    about = {"images": f"{len(files)} files of {folder.name}/"}
    return ImageSet(folder.name, len(files), batches, about, lambda: captions_of_files(folder, files))


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({first_line(error)})") from None


def _shard_images(folder: str, split: str) -> ImageSet:
    """The main bucket of a split, decoded: what a model could reach at best with this codec."""
    shards = ShardSet.open(folder, split)
    shards.require_still("a set of images")
    codec, rows = shards.codec_object(), shards.indices_of(shards.main_bucket)

    def batches(size: int) -> Iterator[Tensor]:
        for start in range(0, len(rows), size):
            yield decoded_pixels(codec, shards.batch(list(rows[start : start + size])).latent)

    def captions() -> tuple[str, ...]:
        return tuple(caption for index in rows for caption in shards.batch([index]).captions)

    about = {"images": f"split {split} of {Path(folder).name}, decoded", "index": shards.fingerprint}
    if len(rows) < shards.num_samples:
        about["bucket"] = f"{shards.main_bucket} alone, {len(rows)} of {shards.num_samples} images"
        print_note(f"note: {folder}:{split}: images of {about['bucket']}: a set has images of one size")
    return ImageSet(f"{Path(folder).name}:{split}", len(rows), batches, about, captions)


def decoded_pixels(codec: Codec, latents: Tensor) -> Tensor:
    """Decode latents (B, C, H, W) to images (B, 3, H, W) uint8, rounded as the ADM evaluator's batches are."""
    return (127.5 * codec.decode(latents) + 128).clamp(0, 255).to(torch.uint8)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
