"""Codec and text encoder of something that exists: prepared shards, or weights that were trained on them.

Latents of another fit are another basis: a base that sees them is no better than noise. So weights files keep the
fitted numbers of their codec in the header, beside the identities of codec and encoder.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.encode.build import (
    CODEC_FILE,
    CODECS,
    codec_bytes,
    codec_of,
    parse_codec,
    restore_text_encoder,
)
from data_pipeline.encode.codecs import Codec
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.identity import Identity
from data_pipeline.index import PLAIN_SALIENCY
from sharpmoe.errors import DataError, first_line
from sharpmoe.shipped_files import find_shipped

FITTED_KEY = "codec_file"  # of a weights file's header: the codec's safetensors file in base64
_CLOSE = 1e-3  # two fits to the same images differ by rounding at most so much, relative to the largest number


class Origin(NamedTuple):
    """The codec and the text encoder of shards or weights."""

    codec: bytes  # a safetensors file, as `codec_bytes` makes it
    codec_identity: Identity
    encoder: Identity | None  # None where the place does not name it
    saliency: Identity | None = None  # kind of the maps of shards; None for weights
    frames: int = 1  # of clips


class _Encoded(Protocol):
    """What says how data were encoded: prepared shards, or a mixture of them."""

    codec: Identity
    encoder: Identity

    def codec_object(self) -> Codec: ...


def origin_header(data: _Encoded) -> dict[str, str]:
    """Return what the header of weights that are trained on `data` says of its codec and text encoder.

    Their identities, and the numbers of a fitted codec. Raises DataError where the shards lack the codec.
    """
    found = {"codec": json.dumps(data.codec), "encoder": json.dumps(data.encoder)}
    return found | (fitted_header(data.codec_object()) if is_fitted(data.codec) else {})


def origin_in(header: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a weights file's header that `origin_header` has written; none where nothing is known."""
    return {key: header[key] for key in ("codec", "encoder", FITTED_KEY) if key in header}


def keeps_codec(header: Mapping[str, str]) -> bool:
    """Return whether a weights file's header says all that is needed to load its codec."""
    return "codec" in header and (FITTED_KEY in header or not is_fitted(json.loads(header["codec"])))


class OriginCoders:
    """Codec and text encoder that a weights file's header names: what drawing images needs of prepared shards."""

    def __init__(self, header: Mapping[str, str], where: str = "the weights' header") -> None:
        """`header`: as `origin_header` makes it; `where`: what messages call it. Reads nothing yet."""
        self._header, self._where = header, where
        self._encoders: dict[str, TextEncoder] = {}  # by device: one takes seconds to load

    def codec_object(self, device: str = "cpu") -> Codec:
        """Load the codec. Raises DataError where it is unknown, damaged, or no longer the same."""
        if "codec" not in self._header:
            raise DataError(f"{self._where}: does not say with which codec the weights were trained")
        content = _fitted_codec(self._header, self._where)
        identity, tensors = ({}, {}) if content is None else parse_codec(content, self._where)
        return codec_of(identity or json.loads(self._header["codec"]), tensors, device, self._where)

    def text_encoder(self, device: str = "cpu") -> TextEncoder:
        """Load the text encoder. Raises DataError where it is unknown, missing, or has other weights."""
        if "encoder" not in self._header:
            raise DataError(f"{self._where}: does not say with which text encoder the weights were trained")
        if device not in self._encoders:
            self._encoders[device] = restore_text_encoder(json.loads(self._header["encoder"]), device)
        return self._encoders[device]

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the empty caption: text (L, D), mask (L,) bool, pooled (D_pooled,). Raises DataError."""
        states, mask, pooled = self.text_encoder().encode([""])
        return states[0], mask[0], pooled[0]


def fitted_header(codec: Codec) -> dict[str, str]:
    """Return the entry of a weights file's header that keeps a fitted codec; none for a codec that is not fitted."""
    return {FITTED_KEY: base64.b64encode(codec_bytes(codec)).decode()} if is_fitted(codec.identity) else {}


def is_fitted(codec: Identity) -> bool:
    """Return whether a codec of this kind is fitted to images, so that its identity alone does not make it again."""
    kind = CODECS.get(codec["kind"])
    return kind is not None and kind.is_fitted


def same_fit(header: Mapping[str, str], codec: Codec) -> bool:
    """Return whether the codec that a weights file's header keeps gives the latents of `codec`, up to rounding.

    False where the header keeps none.
    """
    content = _decoded(header, "weights")
    if content is None:
        return False
    _, stored = parse_codec(content, "weights")
    found = codec.tensors()
    return stored.keys() == found.keys() and all(_close(stored[name], tensor) for name, tensor in found.items())


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _CLOSE * other.abs().max())


def read_origin(place: str | Path) -> Origin:
    """Read the codec and the encoder of a folder of shards, a weights file, or a codec.safetensors.

    Raises DataError where the place is none of these, or does not hold the numbers of a fitted codec.
    """
    path = find_shipped(place)
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: not there; {_EXPECTED}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file ({first_line(error)}); {_EXPECTED}") from None
    if "identity" in header:
        return _origin(path.read_bytes(), str(path), None)
    if "codec" not in header or "encoder" not in header:
        raise DataError(f"{path}: does not say with which codec it was trained; {_EXPECTED}")
    return _of_weights(header, str(path))


_EXPECTED = "expected a folder of prepared shards, or weights that were trained here (.safetensors)"


def _of_folder(folder: Path) -> Origin:
    try:
        index = json.loads((folder / "index.json").read_bytes())
        encoder, saliency = index["encoder"], index.get("saliency", PLAIN_SALIENCY)
        frames = max((bucket["grid"][0] for bucket in _buckets(index) if len(bucket["grid"]) == 3), default=1)
        content = (folder / CODEC_FILE).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: not a complete folder of prepared shards; {_EXPECTED}") from None
    return _origin(content, str(folder / CODEC_FILE), encoder)._replace(saliency=saliency, frames=frames)


def _buckets(index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(index.get("buckets", {}).values())  # schema 1 has none


def _of_weights(header: Mapping[str, str], where: str) -> Origin:
    identity, encoder = json.loads(header["codec"]), json.loads(header["encoder"])
    content = _fitted_codec(header, where)
    known = Origin(codec_bytes(codec_of(identity, {}, "cpu")), identity, encoder) if content is None else None
    found = known or _origin(content or b"", where, encoder)
    return found._replace(frames=json.loads(header.get("model", "{}")).get("latent_frames", 1))


def _fitted_codec(header: Mapping[str, str], where: str) -> bytes | None:
    """Return the codec file that a header keeps; None where the identity says all. Raises DataError."""
    content = _decoded(header, where)
    if content is None and is_fitted(json.loads(header["codec"])):
        raise DataError(
            f"{where}: holds only the hash of its codec (an older version wrote it); name the folder of shards that it "
            "was trained on instead"
        )
    return content


def _origin(content: bytes, where: str, encoder: Identity | None) -> Origin:
    identity, tensors = parse_codec(content, where)
    if is_fitted(identity):
        codec_of(identity, tensors, "cpu", where)  # the numbers are those of the identity
    return Origin(content, identity, encoder)


def _decoded(header: Mapping[str, str], where: str) -> bytes | None:
    try:
        return base64.b64decode(header[FITTED_KEY], validate=True) if FITTED_KEY in header else None
    except (binascii.Error, ValueError):
        raise DataError(f"{where}: the codec in its header is damaged; export the weights again") from None
