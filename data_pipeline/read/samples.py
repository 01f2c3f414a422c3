"""Read one sample of a shard: check its records, decode its members, and make its random choices.

A record is a tar header, a member's content and zero padding. The content is compared with its crc32, header and
padding with what a tar has there, so that a changed bit anywhere is noticed.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipeline.index import Places
from data_pipeline.members import (
    BFLOAT16_BITS,
    Buffer,
    all_finite,
    checksum,
    decode_json,
    decode_npy,
    decode_text,
    suffix_of,
)
from data_pipeline.read.order import DataPurpose, data_generator, uniform
from data_pipeline.safety import CAPS, check_key
from sharpmoe.errors import DamageError

TAR_BLOCK = 512
_CHECKSUM, _TYPE = slice(148, 156), slice(156, 157)  # fields of a tar header
_ADLER = 65521
_PLACE = [int, int, int]  # offset, size, crc32
_T = TypeVar("_T")
_NO_POOLED = np.zeros(0, np.float32)


class Spec(NamedTuple):
    """The shapes of every sample of one bucket."""

    latent: tuple[int, ...]  # (C, h, w), or of frames (C, T, h, w)
    grid: tuple[int, ...]  # tokens (h, w), or (T, h, w)
    text_length: int  # at most
    text_width: int
    pooled_width: int


class Draw(NamedTuple):
    """Key of the choices of one sample: caption, mirror image, noise of the latent; the same on any layout."""

    seed: int
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample; arrays as they are stored, unpadded."""

    key: str
    caption: str
    label: int  # -1 where the sample has no class
    latent: np.ndarray  # (C, [T,] h, w)
    text: np.ndarray  # (L_i, D), floats or the bits of bfloat16 (`members.BFLOAT16_BITS`)
    pooled: np.ndarray  # (D_pooled,); D_pooled is 0 where the encoder does not pool
    saliency: np.ndarray  # (N,)
    foreground: np.ndarray | None  # (N,)


class Span(NamedTuple):
    """Where one sample is in its shard."""

    key: str
    places: Places
    shard_size: int  # actual bytes of the tar


def load_sample(read: Callable[[int, int], bytes], span: Span, spec: Spec, draw: Draw | None) -> Sample:
    """Read one sample by `read(offset, size)`.

    With `draw` the caption is drawn by the weights, the mirror image where there is one, and the latent where its
    standard deviation is stored; without it: first caption, image as it is, mean latent. Raises DamageError,
    which names the member.
    """
    check_key(span.key)
    records = _Records(read, span)
    if "text1.npy" not in span.places and "latent_flip.npy" not in span.places:
        records.fetch(span.places)  # every member is needed: one read
    meta = records.decoded("json", decode_json)
    caption, text = _caption(records, meta, draw)
    flipped = draw is not None and "latent_flip.npy" in span.places and _coin(draw)
    foreground = _map(records, "foreground", spec, flipped) if "foreground.npy" in span.places else None
    return Sample(
        key=span.key,
        caption=caption,
        label=_label(meta),
        latent=_latent(records, spec, flipped, draw),
        text=_text(records, f"text{text}.npy", spec),
        pooled=records.array(f"pooled{text}.npy", (spec.pooled_width,)) if spec.pooled_width else _NO_POOLED,
        saliency=_map(records, "saliency", spec, flipped),
        foreground=foreground,
    )


def load_label(read: Callable[[int, int], bytes], span: Span) -> int:
    """Read the class label of one sample, -1 where it has none, and nothing else of it. Raises DamageError."""
    check_key(span.key)
    return _label(_Records(read, span).decoded("json", decode_json))


def check_sample(read: Callable[[int, int], bytes], span: Span, spec: Spec) -> None:
    """Decode every member of a sample, also those that a run may never draw. Raises DamageError."""
    load_sample(read, span, spec, None)
    records = _Records(read, span)
    records.fetch(span.places)
    shapes = {"latent": spec.latent, "pooled": (spec.pooled_width,)}
    for name in span.places:
        shape = next((shape for stem, shape in shapes.items() if name.startswith(stem)), None)
        if shape is not None:
            records.array(name, shape)
        elif name.startswith("text"):
            _text(records, name, spec)
    captions = records.decoded("json", decode_json).get("captions")
    if captions is not None:
        for number in range(1, len(_weighted(captions))):
            _text(records, f"text{number}.npy", spec)
            if spec.pooled_width:
                records.array(f"pooled{number}.npy", shapes["pooled"])


class _Records:
    """The members of one sample, each read once and checked."""

    def __init__(self, read: Callable[[int, int], bytes], span: Span) -> None:
        self._read, self._span = read, span
        self._contents: dict[str, Buffer] = {}

    def fetch(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        """Read neighbouring members in one call, and check them."""
        places = {name: _checked_place(name, self._span) for name in names}
        if not places:
            raise DamageError("the sample has no members")
        start = min(offset for offset, _, _ in places.values()) - TAR_BLOCK
        end = max(_padded_end(offset, size) for offset, size, _ in places.values())
        if end - start > CAPS.sample:
            raise DamageError(f"the sample has {end - start} bytes, at most {CAPS.sample} are read")
        span = memoryview(self._read(start, end - start))
        for name, (offset, size, expected) in places.items():
            record = span[offset - TAR_BLOCK - start : _padded_end(offset, size) - start]
            content = record[TAR_BLOCK : TAR_BLOCK + size]
            if checksum(content) != expected:
                raise DamageError(f"{name}: checksum differs from the index, the shard is damaged")
            if not _framed(record, f"{self._span.key}.{name}", size):
                raise DamageError(f"{name}: the tar is damaged around this member")
            self._contents[name] = content

    def decoded(self, name: str, decode: Callable[[Buffer], _T]) -> _T:
        """Return a member, decoded."""
        if name not in self._contents:
            if name not in self._span.places:
                raise DamageError(f"{name}: the sample has no such member")
            self.fetch([name])
        try:
            return decode(self._contents[name])
        except DamageError as error:
            raise DamageError(f"{name}: {error}") from None

    def array(self, name: str, shape: tuple[int | None, ...], may_be_bfloat16: bool = False) -> np.ndarray:
        """Return a .npy member of a shape (None: any length); every value is finite."""
        return self.decoded(name, lambda content: _array(content, shape, may_be_bfloat16))

    def has(self, name: str) -> bool:
        return name in self._span.places


def _checked_place(name: str, span: Span) -> tuple[int, int, int]:
    """Return the place of a member. Raises DamageError where it cannot be that of a member of this tar."""
    place = span.places[name]
    if [type(number) for number in place] != _PLACE or place[0] < TAR_BLOCK or place[1] < 0:
        raise DamageError(f"{name[:40]}: {str(place)[:80]} is not a place in a tar")
    offset, size, expected = place
    suffix_of(name)
    if size > CAPS.member:
        raise DamageError(f"{name}: {size} bytes, at most {CAPS.member} are read")
    if _padded_end(offset, size) > span.shard_size:
        raise DamageError(f"{name}: extends beyond the end of the shard, which is cut short")
    return offset, size, expected


def _padded_end(offset: int, size: int) -> int:
    return offset + size + -size % TAR_BLOCK


def _framed(record: memoryview, name: str, size: int) -> bool:
    """Return whether a record has a valid header of a regular file of this name, and ends in zeros."""
    header = bytes(record[:TAR_BLOCK])
    field = header[_CHECKSUM]
    try:
        stored = int(field.strip(b"\0 "), 8)
    except ValueError:
        return False
    # The low half of adler32 is one more than the sum of all bytes. A tar header's checksum is that sum, with eight
    # spaces in the place of the checksum itself.
    found = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * ord(" ")
    sound = (found - stored) % _ADLER == 0 and header[_TYPE] in (b"0", b"\0")
    named = header[:100].rstrip(b"\0") == name.encode()
    return sound and named and not bytes(record[TAR_BLOCK + size :]).strip(b"\0")


def _array(content: Buffer, shape: tuple[int | None, ...], may_be_bfloat16: bool) -> np.ndarray:
    array = decode_npy(content)
    fits = array.shape == shape or (array.ndim == len(shape) == 2 and (None, array.shape[1]) == shape)
    if not fits or not (array.dtype.kind == "f" or (may_be_bfloat16 and array.dtype == BFLOAT16_BITS)):
        raise DamageError(f"{array.dtype} of shape {array.shape}, expected floats of shape {shape}")
    if not all_finite(array):
        raise DamageError("holds NaN or infinity")
    return array


def _coin(draw: Draw) -> bool:
    return uniform(draw.seed, DataPurpose.FLIP, draw.position) < 0.5


def _caption(records: _Records, meta: Mapping[str, Any], draw: Draw | None) -> tuple[str, str]:
    """Return the caption, and the suffix of its members `text` and `pooled`: nothing, 1, 2, ..."""
    captions = meta.get("captions")
    if draw is None or captions is None:
        return records.decoded("txt", decode_text), ""
    texts, weights = zip(*_weighted(captions), strict=True)
    sums = np.cumsum(weights)
    drawn = uniform(draw.seed, DataPurpose.CAPTION, draw.position) * sums[-1]
    number = min(int(np.searchsorted(sums, drawn, side="right")), len(texts) - 1)
    return texts[number], str(number or "")


def _weighted(captions: Any) -> list[tuple[str, float]]:
    """Return captions with their weights, which are not negative and not all zero. Raises DamageError."""
    try:
        weighted = [(str(caption["text"]), float(caption["weight"])) for caption in captions]
    except (KeyError, TypeError, ValueError):
        raise DamageError("json: captions are not a list of text and weight") from None
    weights = [weight for _, weight in weighted]
    if not weights or not all(0 <= weight < math.inf for weight in weights) or not 0 < sum(weights) < math.inf:
        raise DamageError("json: weights of captions are not positive numbers")
    return weighted


def _label(meta: Mapping[str, Any]) -> int:
    label = meta.get("label")
    if type(label) is not int or not -1 <= label < 2**31:
        raise DamageError(f"json: label {label!r} is not a class")
    return label


def _latent(records: _Records, spec: Spec, flipped: bool, draw: Draw | None) -> np.ndarray:
    """Return the latent of the image or its mirror image; drawn around it where the standard deviation is stored."""
    name = "latent_flip" if flipped else "latent"
    mean = records.array(f"{name}.npy", spec.latent)
    if draw is None or not records.has(f"{name}_std.npy"):
        return mean
    std = records.array(f"{name}_std.npy", spec.latent)
    generator = data_generator(draw.seed, DataPurpose.LATENT, draw.position)
    return mean + std * generator.standard_normal(spec.latent, dtype=np.float32)


def _text(records: _Records, name: str, spec: Spec) -> np.ndarray:
    text = records.array(name, (None, spec.text_width), may_be_bfloat16=True)
    if len(text) > spec.text_length:
        raise DamageError(f"{name}: {len(text)} tokens, at most {spec.text_length} expected")
    return text


def _map(records: _Records, name: str, spec: Spec, flipped: bool) -> np.ndarray:
    """Return a map on the token grid, row-major, mirrored with the image."""
    values = records.array(f"{name}.npy", (math.prod(spec.grid),))
    return values.reshape(spec.grid)[..., ::-1].reshape(-1) if flipped else values
