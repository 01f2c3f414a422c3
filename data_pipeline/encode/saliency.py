"""What a kind of saliency maps is: options, what it needs of an image, and how maps are made of a batch.

A kind is a record. Those that need images alone are rows of `prepare.saliency_kinds.SALIENCIES`; one that needs a
trained model is made where such models are known (`sharpmoe.evaluation.base_error`) and joined to them by the launcher.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode.codecs import Codec
from data_pipeline.encode.texts import TextEncoder
from data_pipeline.identity import Identity
from sharpmoe.durable import sha256_of
from sharpmoe.errors import DataError
from sharpmoe.saliency import saliency_map

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12  # digits of a hash in messages


class _Seen(Protocol):
    """What a map may be made of beside pixels; a `sources.images.Picture` is one."""

    @property
    def alpha(self) -> np.ndarray | None:
        """(1, H, W) float32 in [0, 1]; None where the image has no transparency."""
        ...

    @property
    def saliency(self) -> np.ndarray | None:
        """(1, H, W) float32 in [0, 1]; None where the source has no map of the image."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """B images of one resolution, as they are about to be stored."""

    images: Tensor  # (B, 3, H, W) float32 in [-1, 1]
    pictures: Sequence[_Seen]  # the same images
    grid: tuple[int, int]  # tokens (h, w)
    latents: Tensor  # (B, C, h', w') float16: what is stored of their mean
    texts: Sequence[Mapping[str, Tensor]]  # first captions: `text` (L, D), and `pooled` (D_pooled,) if there is one
    labels: Sequence[int]  # -1: none
    numbers: Sequence[int]  # of 62 bits, different and made of the sample's key: random draws are keyed by them

    def pick(self, rows: Sequence[int]) -> "EncodedImages":
        """Return some of the images."""
        index = torch.tensor(rows, dtype=torch.int64)
        return EncodedImages(
            images=self.images[index],
            pictures=[self.pictures[row] for row in rows],
            grid=self.grid,
            latents=self.latents[index],
            texts=[self.texts[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            numbers=[self.numbers[row] for row in rows],
        )


class MapContext(NamedTuple):
    """What a preparation encodes with."""

    codec: Codec
    encoder: TextEncoder
    patch_size: int  # latent pixels per token, each way
    device: str


Maps = Callable[[EncodedImages], Tensor]  # to (B, N) float32 in [0, 1]; a map that is not finite leaves its image out


class SaliencyOption(NamedTuple):
    """One option of a kind."""

    read: Callable[[str], Any]  # a value from text; ValueError where it is none
    form: str  # of the text, in messages
    default: Any = None  # None: not part of the identity


@dataclass(frozen=True, kw_only=True)
class SaliencyKind:
    """One origin of saliency maps."""

    name: str  # in the identity of shards
    text: str  # for --help
    create: "Callable[[SaliencyChoice, MapContext], Maps]"
    options: Mapping[str, SaliencyOption] = field(default_factory=dict)
    needs_file: bool = False  # `path=FILE`, which the identity names by its last part and its sha256
    takes_maps: bool = False  # reads the maps that a source has of its images
    has_map: Callable[[_Seen], bool] = lambda _: True  # whether an image has what a map is made of
    lacking: str = ""  # says so where it has not

    def usage(self) -> str:
        """Return how the kind is written, with its options."""
        path = ["path=FILE"] if self.needs_file else []
        known = ",".join([*path, *(f"{name}={option.form}" for name, option in self.options.items())])
        return f"{self.name}:{known}" if known else self.name


def _flat(images: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.zeros(len(images), grid[0] * grid[1])


# Maps of images that lack what the kind needs, by the value of `missing`; None, which is `skip`, leaves them out.
SUBSTITUTES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor] | None] = {
    "skip": None,
    "laplacian": saliency_map,
    "flat": _flat,
}


def _missing(text: str) -> str | None:
    if text not in SUBSTITUTES:
        raise ValueError(text)
    return None if SUBSTITUTES[text] is None else text


MISSING = {"missing": SaliencyOption(_missing, "|".join(SUBSTITUTES))}


@dataclass(frozen=True, kw_only=True)
class SaliencyChoice:
    """A kind with its options: what a recipe says of saliency maps."""

    kind: SaliencyKind
    identity: Identity  # part of that of the shards; without machine paths
    path: str = ""  # of the kind's file

    @property
    def needs_maps(self) -> bool:
        """Whether an image without a map of its own in the source is left out."""
        return self.kind.takes_maps and self._substitute is None

    def lacking(self, picture: _Seen) -> str:
        """Return why an image is left out: it lacks what its map is made of. "" where it does not."""
        return "" if self._substitute is not None or self.kind.has_map(picture) else self.kind.lacking

    def maps(self, make: Maps, batch: EncodedImages) -> tuple[Tensor, list[bool]]:
        """Return the maps (B, N) float32, and of which images they are substitutes, as `missing` has it."""
        own = [row for row, picture in enumerate(batch.pictures) if self.kind.has_map(picture)]
        if len(own) == len(batch.numbers):
            return make(batch), [False] * len(own)
        assert self._substitute is not None  # such images are left out when they are decoded
        found = self._substitute(batch.images, batch.grid)
        if own:
            found[torch.tensor(own)] = make(batch.pick(own))
        return found, [row not in own for row in range(len(batch.numbers))]

    def line(self) -> str:
        """Say on one line what the maps are."""
        return saliency_line(self.identity)

    @property
    def _substitute(self) -> Callable[[Tensor, tuple[int, int]], Tensor] | None:
        return SUBSTITUTES[self.identity.get("missing", "skip")]


def saliency_line(identity: Identity) -> str:
    """Name a kind of maps with its options, as an index has them."""
    shown = [f"{key} {_shown(value)}" for key, value in identity.items() if key != "kind"]
    return f"{identity['kind']} ({', '.join(shown)})" if shown else str(identity["kind"])


def _shown(value: Any) -> str:
    text = "/".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:_SHOWN] if _DIGEST.fullmatch(text) else text


def parse_saliency(text: str, kinds: Mapping[str, SaliencyKind]) -> SaliencyChoice:
    """Parse `KIND` or `KIND:key=value,key=value`. Raises DataError for what the kind does not have, or a missing file.

    `kinds`: by the names that may be written.
    """
    name, colon, rest = text.partition(":")
    if name not in kinds:
        raise DataError(f"--saliency {text}: kind {name!r}; expected {', '.join(kinds)}")
    kind = kinds[name]
    values: dict[str, Any] = {name: option.default for name, option in kind.options.items()}
    path = ""
    for part in rest.split(",") if colon else ():
        key, _, value = part.partition("=")
        if kind.needs_file and key == "path" and value:
            path = value
            continue
        try:
            values[key] = kind.options[key].read(value)
        except (KeyError, ValueError):
            raise DataError(f"--saliency {text}: option {part!r}; expected {kind.usage()}") from None
    identity = {"kind": kind.name} | (_file_identity(text, kind, path) if kind.needs_file else {})
    return SaliencyChoice(
        kind=kind, identity=identity | {key: value for key, value in values.items() if value is not None}, path=path
    )


def _file_identity(text: str, kind: SaliencyKind, path: str) -> Identity:
    if not path:
        raise DataError(f"--saliency {text}: names no file; expected {kind.usage()}")
    if not Path(path).is_file():
        raise DataError(f"--saliency {text}: path {path} is no file; give that of {kind.text}")
    return {"file": Path(path).name, "sha256": sha256_of(Path(path))}


# --- values of options ------------------------------------------------------------------------------------------------


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of whole numbers within bounds."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text[:10]) <= most:
            raise ValueError(text)
        return int(text)

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """Return a reader of one of several words."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def numbers(least: float, most: float, count: range) -> Callable[[str], list[float]]:
    """Return a reader of so many finite numbers within bounds, written as `0.2/0.5`."""

    def read(text: str) -> list[float]:
        found = [float(part) for part in text.split("/")]
        if len(found) not in count or not all(least <= value <= most for value in found):
            raise ValueError(text)
        return found

    return read
